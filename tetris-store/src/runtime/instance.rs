//! One instance that answers many requests: a queue, a batcher, and `c` worker threads.

use std::any::Any;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::batcher::{Batcher, Next};
use super::profile::ProfileRow;
use crate::error::{Error, Result};

/// How an [`Instance`] runs.
#[derive(Debug, Clone, Copy)]
pub struct InstanceConfig {
    /// Batch size, concurrency, and the latency they were measured with. Where the SLO is to hold
    /// for 99% of requests, that is the 99th percentile: a batch is started so late that it would
    /// be in time by it.
    pub row: ProfileRow,
    /// Time in which a request must be answered.
    pub slo: Duration,
    /// Requests that may wait; one more is turned away. A queue longer than the instance can serve
    /// within the SLO only makes requests late.
    pub queue: usize,
}

impl InstanceConfig {
    /// `row` under `slo`, with as long a queue as can be served within the SLO.
    pub fn new(row: ProfileRow, slo: Duration) -> Self {
        let in_time = (row.qps() * slo.as_secs_f64()).floor() as usize;
        let one_round = row.batch as usize * row.concurrency as usize;
        Self {
            row,
            slo,
            queue: in_time.max(one_round),
        }
    }
}

/// An instance of a function, shared by all who call it.
///
/// It runs `concurrency` threads named `tetris-runtime`, which end with it: dropping it answers
/// what waits and joins them.
pub struct Instance<I, O> {
    shared: Arc<Shared<I, O>>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared<I, O> {
    start: Instant,
    slo: Duration,
    latency: Duration,
    queue_limit: usize,
    batcher: Mutex<Batcher<Request<I, O>>>,
    changed: Condvar,
    infer: Box<dyn Fn(Vec<I>) -> Vec<O> + Send + Sync>,
    counters: Counters,
}

struct Request<I, O> {
    input: I,
    asked: Instant,
    answer: SyncSender<Result<O>>,
}

#[derive(Default)]
struct Counters {
    batches: AtomicU64,
    requests: AtomicU64,
    turned_away: AtomicU64,
    expired: AtomicU64,
    panics: AtomicU64,
}

/// What an instance has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct InstanceStats {
    /// Batches run.
    pub batches: u64,
    /// Requests that were in them.
    pub requests: u64,
    /// Requests refused because the queue was full.
    pub turned_away: u64,
    /// Requests whose deadline had passed before their turn.
    pub expired: u64,
    /// Batches that panicked.
    pub panics: u64,
    /// Requests that wait now.
    pub waiting: usize,
}

/// A request under way.
#[derive(Debug)]
pub struct Ticket<O> {
    answer: Receiver<Result<O>>,
    asked: Instant,
    deadline: Instant,
}

impl<O> Ticket<O> {
    /// Waits for the answer, at most until the deadline.
    ///
    /// # Errors
    /// [`Error::DeadlineExceeded`], also where the answer came but came late;
    /// [`Error::InferencePanicked`] and [`Error::WrongBatch`] where the closure failed the whole
    /// batch; [`Error::InstanceClosed`].
    pub fn wait(self) -> Result<O> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.answer.recv_timeout(left) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err(Error::DeadlineExceeded {
                waited: self.asked.elapsed(),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(Error::InstanceClosed),
        }
    }
}

impl<I: Send + 'static, O: Send + 'static> Instance<I, O> {
    /// Starts an instance that answers batches of one to `b` requests with `infer`, one answer per
    /// request in their order, on `c` threads at a time. Where `infer` panics, the requests of that
    /// batch get a typed error, and the instance goes on.
    ///
    /// # Errors
    /// [`Error::SloUnreachable`] where the configuration cannot keep the SLO; [`Error::Io`] where
    /// no thread can be had.
    pub fn start(
        config: InstanceConfig,
        infer: impl Fn(Vec<I>) -> Vec<O> + Send + Sync + 'static,
    ) -> Result<Self> {
        let row = super::Profile::new(vec![config.row])?
            .cheapest(config.slo, super::CpuPrice::default())?;
        let mut instance = Self {
            shared: Arc::new(Shared {
                start: Instant::now(),
                slo: config.slo,
                latency: row.latency,
                queue_limit: config.queue,
                batcher: Mutex::new(Batcher::new(&row, config.slo, config.queue)),
                changed: Condvar::new(),
                infer: Box::new(infer),
                counters: Counters::default(),
            }),
            workers: Vec::with_capacity(row.concurrency as usize),
        };
        for _ in 0..row.concurrency {
            let shared = instance.shared.clone();
            let worker = thread::Builder::new()
                .name("tetris-runtime".into())
                .spawn(move || shared.work())
                .map_err(Error::io("start a thread of", "an instance"))?;
            instance.workers.push(worker);
        }
        Ok(instance)
    }

    /// Puts a request into the queue, to be answered within the SLO.
    ///
    /// # Errors
    /// [`Error::Overloaded`] where the queue is full: try another instance, or later.
    pub fn submit(&self, input: I) -> Result<Ticket<O>> {
        self.submit_within(input, self.shared.slo)
    }

    /// Puts a request into the queue, to be answered within `limit`; more than the SLO is not
    /// waited for.
    ///
    /// # Errors
    /// [`Error::Overloaded`] where the queue is full; [`Error::DeadlineExceeded`] where not even an
    /// empty instance would make it.
    pub fn submit_within(&self, input: I, limit: Duration) -> Result<Ticket<O>> {
        let shared = &*self.shared;
        let limit = limit.min(shared.slo);
        if limit < shared.latency {
            return Err(Error::DeadlineExceeded {
                waited: Duration::ZERO,
            });
        }
        let asked = Instant::now();
        let (answer, receiver) = mpsc::sync_channel(1);
        let now = asked.duration_since(shared.start);
        let taken = shared.lock().push(
            Request {
                input,
                asked,
                answer,
            },
            now,
            now + limit,
        );
        if taken.is_err() {
            // Ordering: counters stand for themselves.
            shared.counters.turned_away.fetch_add(1, Ordering::Relaxed);
            return Err(Error::Overloaded {
                limit: shared.queue_limit,
            });
        }
        shared.changed.notify_one();
        Ok(Ticket {
            answer: receiver,
            asked,
            deadline: asked + limit,
        })
    }

    /// Asks and waits.
    ///
    /// # Errors
    /// As [`Instance::submit`] and [`Ticket::wait`].
    pub fn call(&self, input: I) -> Result<O> {
        self.submit(input)?.wait()
    }

    /// What it has done so far.
    pub fn stats(&self) -> InstanceStats {
        let counters = &self.shared.counters;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        InstanceStats {
            batches: count(&counters.batches),
            requests: count(&counters.requests),
            turned_away: count(&counters.turned_away),
            expired: count(&counters.expired),
            panics: count(&counters.panics),
            waiting: self.shared.lock().len(),
        }
    }
}

impl<I, O> Shared<I, O> {
    fn lock(&self) -> MutexGuard<'_, Batcher<Request<I, O>>> {
        // No user code runs under this lock.
        self.batcher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut batcher = self.lock();
        loop {
            let now = self.start.elapsed();
            match batcher.next(now) {
                Next::Batch(requests) => {
                    let more = batcher.len() > 0;
                    drop(batcher);
                    if more {
                        self.changed.notify_one();
                    }
                    self.run(requests);
                    batcher = self.lock();
                }
                Next::Expired(requests) => {
                    drop(batcher);
                    let count = requests.len() as u64;
                    self.counters.expired.fetch_add(count, Ordering::Relaxed);
                    for request in requests {
                        let waited = request.asked.elapsed();
                        let late = Error::DeadlineExceeded { waited };
                        // Whoever asked may be gone.
                        let _ = request.answer.send(Err(late));
                        drop_quietly(request.input);
                    }
                    batcher = self.lock();
                }
                Next::WaitUntil(due) => {
                    let wait = due.saturating_sub(now);
                    batcher = self
                        .changed
                        .wait_timeout(batcher, wait)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                Next::Idle => {
                    batcher = self
                        .changed
                        .wait(batcher)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Next::Closed => break,
            }
        }
    }

    fn run(&self, requests: Vec<Request<I, O>>) {
        let (inputs, answers): (Vec<_>, Vec<_>) =
            requests.into_iter().map(|r| (r.input, r.answer)).unzip();
        let given = inputs.len();
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        self.counters
            .requests
            .fetch_add(given as u64, Ordering::Relaxed);
        // What the closure leaves behind half done is its own: it is `Fn`, so it shares nothing
        // with us.
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| (self.infer)(inputs)));
        match outcome {
            Ok(outputs) if outputs.len() == given => {
                for (answer, output) in answers.into_iter().zip(outputs) {
                    // Whoever asked may have stopped waiting.
                    if let Err(unread) = answer.send(Ok(output)) {
                        drop_quietly(unread);
                    }
                }
            }
            Ok(outputs) => {
                let returned = outputs.len();
                drop_quietly(outputs);
                for answer in answers {
                    let _ = answer.send(Err(Error::WrongBatch { given, returned }));
                }
            }
            Err(panic) => {
                self.counters.panics.fetch_add(1, Ordering::Relaxed);
                let message = panic_message(&*panic);
                drop_quietly(panic);
                tracing::error!(message, requests = given, "inference panicked");
                for answer in answers {
                    let message = message.clone();
                    let _ = answer.send(Err(Error::InferencePanicked { message }));
                }
            }
        }
    }
}

/// Drops a value of the user's whose `drop` may panic, without losing the worker to it.
fn drop_quietly<T>(value: T) {
    if panic::catch_unwind(AssertUnwindSafe(|| drop(value))).is_err() {
        tracing::error!("a value of an inference panicked when it was dropped");
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a value that is no text".to_owned())
}

impl<I, O> Drop for Instance<I, O> {
    fn drop(&mut self) {
        self.shared.lock().close();
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // The closure may own what drops us: a thread cannot join itself, and ends on its own.
            if worker.thread().id() != thread::current().id() && worker.join().is_err() {
                tracing::error!("a worker of an instance panicked outside of the closure");
            }
        }
    }
}

impl<I, O> fmt::Debug for Instance<I, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance")
            .field("workers", &self.workers.len())
            .field("slo", &self.shared.slo)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use carlsbad_types::ByteSize;

    use super::*;

    fn config(batch: u32, concurrency: u32, latency_ms: u64, slo_ms: u64) -> InstanceConfig {
        let row = ProfileRow {
            cpus: 1.0,
            gpu_share: 0.0,
            memory: ByteSize::ZERO,
            batch,
            concurrency,
            latency: Duration::from_millis(latency_ms),
        };
        InstanceConfig::new(row, Duration::from_millis(slo_ms))
    }

    #[test]
    fn everyone_gets_the_answer_to_their_own_question() {
        let instance = Instance::start(config(4, 2, 20, 2_000), |inputs: Vec<u64>| {
            inputs.iter().map(|x| x * x).collect()
        })
        .unwrap();
        thread::scope(|scope| {
            for caller in 0..16u64 {
                let instance = &instance;
                scope.spawn(move || {
                    for i in 0..20 {
                        let x = caller * 1000 + i;
                        // 16 callers never exceed the queue.
                        assert_eq!(instance.call(x).unwrap(), x * x);
                    }
                });
            }
        });
        let stats = instance.stats();
        assert_eq!(stats.requests, 16 * 20);
        assert!(
            stats.batches < stats.requests,
            "nothing was batched: {stats:?}"
        );
    }

    #[test]
    fn a_full_queue_turns_away() {
        let (gate, wait) = mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let mut small = config(1, 1, 1, 10_000);
        small.queue = 3;
        let instance = Instance::start(small, move |inputs: Vec<u8>| {
            let _ = wait.lock().unwrap().recv();
            inputs
        })
        .unwrap();
        let mut tickets = vec![instance.submit(0).unwrap()];
        while instance.stats().waiting > 0 {
            thread::yield_now();
        }
        tickets.extend((1..4).map(|i| instance.submit(i).unwrap()));
        let refused = instance.submit(4).unwrap_err();
        assert!(
            matches!(refused, Error::Overloaded { limit: 3 }),
            "{refused}"
        );
        drop(gate);
        for (i, ticket) in tickets.into_iter().enumerate() {
            assert_eq!(ticket.wait().unwrap(), i as u8);
        }
    }

    #[test]
    fn a_panicking_closure_costs_its_batch_an_error_and_the_instance_survives() {
        let instance = Instance::start(config(1, 1, 1, 5_000), |inputs: Vec<i32>| {
            assert!(inputs[0] >= 0, "negative input");
            if inputs[0] == 99 {
                return vec![];
            }
            inputs
        })
        .unwrap();
        for _ in 0..3 {
            let refused = instance.call(-1).unwrap_err();
            assert!(
                matches!(&refused, Error::InferencePanicked { message } if message.contains("negative")),
                "{refused}"
            );
            assert_eq!(instance.call(7).unwrap(), 7);
        }
        let refused = instance.call(99).unwrap_err();
        assert!(
            matches!(
                refused,
                Error::WrongBatch {
                    given: 1,
                    returned: 0
                }
            ),
            "{refused}"
        );
        assert_eq!(instance.stats().panics, 3);
    }

    #[test]
    fn values_that_panic_when_dropped_do_not_take_the_worker_along() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                if !thread::panicking() {
                    panic!("dropped");
                }
            }
        }
        let instance = Instance::start(config(1, 1, 1, 5_000), |inputs: Vec<bool>| {
            inputs.iter().map(|bomb| bomb.then(|| Bomb)).collect()
        })
        .unwrap();
        drop(instance.submit(true).unwrap());
        for _ in 0..3 {
            assert!(instance.call(false).unwrap().is_none());
        }
    }

    #[test]
    fn a_slow_closure_makes_requests_late_with_a_typed_error() {
        let instance = Instance::start(config(1, 1, 1, 30), |inputs: Vec<u8>| {
            thread::sleep(Duration::from_millis(120));
            inputs
        })
        .unwrap();
        let first = instance.submit(1).unwrap();
        let second = instance.submit(2).unwrap();
        for ticket in [first, second] {
            let refused = ticket.wait().unwrap_err();
            assert!(
                matches!(refused, Error::DeadlineExceeded { .. }),
                "{refused}"
            );
        }
        let hopeless = instance.submit_within(3, Duration::ZERO).unwrap_err();
        assert!(matches!(hopeless, Error::DeadlineExceeded { .. }));
        drop(instance);
    }

    #[test]
    fn a_configuration_that_cannot_keep_the_slo_is_not_started() {
        let refused = Instance::start(config(4, 1, 60, 100), |inputs: Vec<u8>| inputs).unwrap_err();
        assert!(matches!(refused, Error::SloUnreachable { .. }), "{refused}");
    }

    #[test]
    fn dropping_it_answers_what_waits_and_joins_its_threads() {
        for _ in 0..5 {
            // Every thread has it, for as long as it runs.
            let held = Arc::new(());
            let inner = Arc::clone(&held);
            let infer = move |inputs: Vec<usize>| {
                let _held = &inner;
                inputs
            };
            let instance = Instance::start(config(64, 3, 10, 60_000), infer).unwrap();
            let tickets: Vec<_> = (0..10).map(|i| instance.submit(i).unwrap()).collect();
            drop(instance);
            assert_eq!(Arc::strong_count(&held), 1, "threads are left");
            for (i, ticket) in tickets.into_iter().enumerate() {
                assert_eq!(ticket.wait().unwrap(), i);
            }
        }
    }
}
