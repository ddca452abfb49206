//! Accepting connections.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::connection;
use crate::registry::Registry;

/// Pause after an accept that failed for want of resources, so that it is not tried in a loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves a registry's subsystems, the discovery subsystem among them, to whoever connects, until
/// [`Registry::shutdown`]: then no more connections are accepted, commands in execution finish and are answered,
/// connections close, and this returns.
///
/// Several listeners may serve one registry. Call it within a `LocalSet`, on the thread of the registry's devices.
/// Dropping the future drops its connections and abandons their commands without waiting for them.
///
/// # Errors
/// Never for what a peer did; only if the listener itself is broken.
pub async fn serve(listener: TcpListener, registry: Rc<Registry>) -> io::Result<()> {
    let mut shutdown = registry.shutdown_receiver();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            // The sender lives in the registry, which is held here.
            _ = shutdown.wait_for(|&shutdown| shutdown) => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    connections.spawn_local(connection::run(stream, peer, Rc::clone(&registry)));
                }
                Err(error) if is_fatal(&error) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Whether the listener can accept nothing any more. All else is a connection that went away or a shortage.
fn is_fatal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput) || error.raw_os_error() == Some(9)
}
