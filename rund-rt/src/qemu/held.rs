//! Clones that were made ahead: each a machine that has read its state and stands still, and the
//! thread that it lives with, which waits for what it is to do.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::job::{Begun, Job};
use super::machine::{Machine, Start, failed};
use super::{START, Saved};
use crate::error::Result;

/// What a machine's thread is called.
const THREAD: &str = "rund-qemu";

type Order = Box<(Job, Sender<Begun>)>;

/// The machines of a template that were made ahead.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Held>>);

impl Pool {
    pub(super) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(super) fn add(&self, held: Held) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(held);
    }

    fn take(&self) -> Option<Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    /// Starts a job: in a machine that was made ahead, or in a new one. Its thread.
    pub(super) fn start(&self, job: Job, says: Sender<Begun>) -> Result<JoinHandle<()>> {
        let Some(held) = self.take() else {
            return start(job, says);
        };
        match held.give(Box::new((job, says))) {
            Ok(thread) => Ok(thread),
            // Its thread is gone.
            Err(order) => {
                let (job, says) = *order;
                start(job, says)
            }
        }
    }
}

/// Starts a job in a new machine. Its thread.
pub(super) fn start(job: Job, says: Sender<Begun>) -> Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(THREAD.to_owned())
        .spawn(move || job.run(&says))
        .map_err(failed("start its thread"))
}

/// One machine that waits. It ends when it is dropped, and its thread is joined.
#[derive(Debug)]
pub(super) struct Held {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Held {
    /// Makes one, and waits until it could run.
    pub(super) fn make(saved: &Arc<Saved>) -> Result<Self> {
        let (orders, waits) = channel();
        let (says, ready) = channel();
        let saved = Arc::clone(saved);
        let thread = thread::Builder::new()
            .name(THREAD.to_owned())
            .spawn(move || hold(saved, &says, &waits))
            .map_err(failed("start its thread"))?;
        let held = Self {
            orders: Some(orders),
            thread: Some(thread),
        };
        match ready.recv() {
            Ok(ready) => ready.map(|()| held),
            Err(why) => Err(failed("start")(why)),
        }
    }

    fn give(mut self, order: Order) -> std::result::Result<JoinHandle<()>, Order> {
        match (self.orders.take(), self.thread.take()) {
            (Some(orders), Some(thread)) => match orders.send(order) {
                Ok(()) => Ok(thread),
                Err(SendError(order)) => Err(order),
            },
            _ => Err(order),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// What the thread does.
fn hold(saved: Arc<Saved>, says: &Sender<Result<()>>, orders: &Receiver<Order>) {
    let start = Start::From {
        state: &saved.state,
        held: true,
    };
    let machine = Machine::start(&saved.shape, &saved.memory, start, Instant::now() + START);
    // The template must not be held by what it holds, nor end in this thread: its owner waits.
    drop(saved);
    let machine = match machine {
        Ok(machine) => {
            let _nobody_waits = says.send(Ok(()));
            machine
        }
        Err(why) => {
            let _nobody_waits = says.send(Err(why));
            return;
        }
    };
    if let Ok(order) = orders.recv() {
        let (job, says) = *order;
        job.run_in(machine, &says);
    }
}
