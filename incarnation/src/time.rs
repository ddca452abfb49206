//! Waiting by the clock of an [`Env`].

use std::time::Duration;

use futures_util::future::{Either, select};
use weft_volume::seams::Env;

pub(crate) async fn sleep(env: &dyn Env, duration: Duration) {
    env.sleep_until(env.now().after(duration)).await;
}

/// What `future` answers, unless `limit` passes first.
pub(crate) async fn within<T>(env: &dyn Env, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let timeout = env.sleep_until(env.now().after(limit));
    match select(std::pin::pin!(future), timeout).await {
        Either::Left((answer, _)) => Some(answer),
        Either::Right(_) => None,
    }
}
