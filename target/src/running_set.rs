//! Futures that end in any order, each in a place that is used again.
//!
//! A connection adds and ends hundreds of thousands of commands a second. A set that keeps each future in an allocation of its own
//! makes and returns one for each; here only a set that grows does, and each place keeps its waker.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Places that an empty set keeps. A guess: most hosts' queues are no deeper.
const KEPT: usize = 128;

/// See the module.
pub(crate) struct RunningSet<F> {
    places: Vec<Place<F>>,
    /// Places without a future.
    free: Vec<usize>,
    /// Places to look at, some of them perhaps in vain.
    due: VecDeque<usize>,
    called: Arc<Called>,
}

struct Place<F> {
    future: Option<F>,
    call: Arc<Call>,
    waker: Waker,
}

/// What wakers leave for the set. They may be on any thread, and outlive it.
#[derive(Default)]
struct Called(Mutex<Calls>);

#[derive(Default)]
struct Calls {
    places: Vec<usize>,
    /// Whoever waits for one of the futures to end.
    waiting: Option<Waker>,
}

impl Called {
    fn lock(&self) -> MutexGuard<'_, Calls> {
        // Nobody panics with it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The waker of a place, whichever future is in it.
struct Call {
    place: usize,
    /// And not looked at since.
    made: AtomicBool,
    called: Arc<Called>,
}

impl Wake for Call {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.made.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut calls = self.called.lock();
        calls.places.push(self.place);
        let waiting = calls.waiting.take();
        drop(calls);
        if let Some(waiting) = waiting {
            waiting.wake();
        }
    }
}

impl<F: Future + Unpin> RunningSet<F> {
    pub(crate) fn new() -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
            due: VecDeque::new(),
            called: Arc::default(),
        }
    }

    /// Futures that have not ended.
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a future, for the next [`Self::poll_next`] to look at.
    pub(crate) fn push(&mut self, future: F) {
        let index = match self.free.pop() {
            Some(index) => {
                self.places[index].future = Some(future);
                index
            }
            None => {
                let place = self.places.len();
                let call = Arc::new(Call {
                    place,
                    made: AtomicBool::new(false),
                    called: Arc::clone(&self.called),
                });
                self.places.push(Place {
                    future: Some(future),
                    waker: Waker::from(Arc::clone(&call)),
                    call,
                });
                place
            }
        };
        self.due.push_back(index);
    }

    /// What the next of them ended with; `None` if there is none.
    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<F::Output>> {
        if self.is_empty() {
            return Poll::Ready(None);
        }
        // Futures that call themselves again and again do not keep others of this thread from their turn. Twice, as a former future's
        // waker may call a place too.
        let mut looks = 2 * self.len();
        loop {
            let Some(index) = self.due.pop_front() else {
                let mut calls = self.called.lock();
                if calls.places.is_empty() {
                    let known = calls.waiting.as_ref();
                    if !known.is_some_and(|known| known.will_wake(context.waker())) {
                        calls.waiting = Some(context.waker().clone());
                    }
                    return Poll::Pending;
                }
                self.due.extend(calls.places.drain(..));
                continue;
            };
            if looks == 0 {
                self.due.push_front(index);
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            // A waker of a future that has ended may still have called.
            let Some(place) = self.places.get_mut(index) else {
                continue;
            };
            // Also sees what whoever called did before.
            place.call.made.swap(false, Ordering::AcqRel);
            let Some(future) = &mut place.future else {
                continue;
            };
            if let Poll::Ready(output) = Pin::new(future).poll(&mut Context::from_waker(&place.waker)) {
                place.future = None;
                self.free.push(index);
                self.shrink();
                return Poll::Ready(Some(output));
            }
            looks -= 1;
        }
    }

    /// Waits for the next of them to end; `None` if there is none.
    pub(crate) async fn next(&mut self) -> Option<F::Output> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn shrink(&mut self) {
        if self.places.len() > KEPT && self.is_empty() {
            self.places.truncate(KEPT);
            self.places.shrink_to_fit();
            self.free = (0..KEPT).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use futures_util::future::LocalBoxFuture;
    use tokio::sync::oneshot;

    use super::*;

    type Set = RunningSet<LocalBoxFuture<'static, usize>>;

    /// Counts how often it was woken.
    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Count {
        fn get(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// A future that ends with `number` once something is sent.
    fn waits(number: usize) -> (oneshot::Sender<()>, LocalBoxFuture<'static, usize>) {
        let (sender, receiver) = oneshot::channel();
        (sender, receiver.map(move |_| number).boxed_local())
    }

    #[test]
    fn futures_end_in_the_order_of_their_calls_and_wake_the_set_once() {
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut context = Context::from_waker(&waker);
        let mut set = Set::new();
        assert_eq!(set.poll_next(&mut context), Poll::Ready(None));
        let senders: Vec<_> = (0..300)
            .map(|number| {
                let (sender, future) = waits(number);
                set.push(future);
                sender
            })
            .collect();
        assert_eq!(
            (set.poll_next(&mut context), set.len(), count.get()),
            (Poll::Pending, 300, 0)
        );
        for sender in senders.into_iter().rev() {
            sender.send(()).unwrap();
        }
        assert_eq!(count.get(), 1);
        for number in (0..300).rev() {
            assert_eq!(set.poll_next(&mut context), Poll::Ready(Some(number)));
        }
        assert!(set.is_empty() && set.places.len() == KEPT);
        assert_eq!(set.poll_next(&mut context), Poll::Ready(None));
    }

    #[test]
    fn a_place_is_used_again_whatever_its_former_waker_does() {
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut context = Context::from_waker(&waker);
        let mut set = Set::new();
        let kept = Arc::new(Mutex::new(None));
        let keeps = Arc::clone(&kept);
        set.push(
            poll_fn(move |context| {
                *keeps.lock().unwrap() = Some(context.waker().clone());
                Poll::Ready(1)
            })
            .boxed_local(),
        );
        assert_eq!(set.poll_next(&mut context), Poll::Ready(Some(1)));
        let former: Waker = kept.lock().unwrap().take().unwrap();
        former.wake_by_ref();
        let (sender, future) = waits(2);
        set.push(future);
        assert_eq!(
            (set.poll_next(&mut context), set.places.len()),
            (Poll::Pending, 1)
        );
        former.wake();
        assert_eq!((set.poll_next(&mut context), count.get()), (Poll::Pending, 1));
        sender.send(()).unwrap();
        assert_eq!(
            (set.poll_next(&mut context), count.get()),
            (Poll::Ready(Some(2)), 2)
        );
    }

    #[test]
    fn a_future_that_calls_itself_for_ever_leaves_others_their_turn() {
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut context = Context::from_waker(&waker);
        let mut set = Set::new();
        set.push(
            poll_fn(|context| {
                context.waker().wake_by_ref();
                Poll::Pending
            })
            .boxed_local(),
        );
        let (sender, future) = waits(2);
        set.push(future);
        assert_eq!((set.poll_next(&mut context), count.get()), (Poll::Pending, 1));
        sender.send(()).unwrap();
        assert_eq!(set.poll_next(&mut context), Poll::Ready(Some(2)));
    }

    #[tokio::test]
    async fn wakers_may_be_on_other_threads() {
        let mut set = Set::new();
        let mut senders = Vec::new();
        for number in 0..1000 {
            let (sender, future) = waits(number);
            senders.push(sender);
            set.push(future);
        }
        let thread = std::thread::spawn(move || {
            for (number, sender) in senders.into_iter().enumerate() {
                if number % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                sender.send(()).unwrap();
            }
        });
        let mut ended = Vec::new();
        while let Some(number) = set.next().await {
            ended.push(number);
        }
        ended.sort_unstable();
        assert!(ended.into_iter().eq(0..1000));
        thread.join().unwrap();
    }
}
