//! The thread of a machine: starts QEMU, tells the guest what it is, takes what it says.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;

use super::guest::{Transcript, read_until_ready};
use super::machine::{Machine, Monitor, Shape, Start, failed};
use super::watchdog::Watchdog;
use super::{START, Saved};
use crate::backend::{Exit, Status};
use crate::error::{Error, Result};

const CHUNK: usize = 1 << 16;

/// Where a machine begins.
pub(super) enum Origin {
    Template(Arc<Saved>),
    Cold { shape: Shape, memory: OwnedFd },
}

/// What the thread of a machine says once it runs.
pub(super) type Begun = Result<(u32, Monitor)>;

/// A machine's end, as its thread says it.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) end: Mutex<Option<std::result::Result<Exit, String>>>,
    pub(super) changed: Condvar,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<std::result::Result<Exit, String>>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread of a machine does: it starts QEMU, and lives as long.
pub(super) struct Job {
    pub(super) origin: Origin,
    /// What the guest is told.
    pub(super) message: Vec<u8>,
    /// What it says before its exit code.
    pub(super) end: Vec<u8>,
    pub(super) output: Option<Option<File>>,
    pub(super) most: ByteSize,
    pub(super) run_time: Option<Duration>,
    pub(super) shared: Arc<Shared>,
}

impl Job {
    pub(super) fn run(self, says: &Sender<Begun>) {
        let begun = self.begin();
        self.finish(begun, says);
    }

    /// The same with a machine that was held; where that is gone, with a new one.
    pub(super) fn run_in(self, mut machine: Machine, says: &Sender<Begun>) {
        let begun = match machine.resume().and_then(|()| machine.monitor()) {
            Ok(monitor) => Ok((machine, monitor)),
            Err(why) => {
                tracing::warn!(%why, "a machine that was made ahead is of no use");
                drop(machine);
                self.begin()
            }
        };
        self.finish(begun, says);
    }

    fn finish(mut self, begun: Result<(Machine, Monitor)>, says: &Sender<Begun>) {
        let end = match begun {
            Ok((machine, monitor)) => {
                let _nobody_waits = says.send(Ok((machine.pid(), monitor)));
                self.see_through(machine).map_err(|why| why.to_string())
            }
            Err(why) => {
                let text = why.to_string();
                let _nobody_waits = says.send(Err(why));
                Err(text)
            }
        };
        *self.shared.lock() = Some(end);
        self.shared.changed.notify_all();
    }

    fn begin(&self) -> Result<(Machine, Monitor)> {
        let deadline = Instant::now() + START;
        let (shape, memory, start) = match &self.origin {
            Origin::Template(saved) => {
                let state = &saved.state;
                let start = Start::From { state, held: false };
                (&saved.shape, &saved.memory, start)
            }
            Origin::Cold { shape, memory } => (shape, memory, Start::Boot),
        };
        let machine = Machine::start(shape, memory, start, deadline)?;
        let monitor = machine.monitor()?;
        Ok((machine, monitor))
    }

    /// Tells the guest what it is, takes what it says, and waits for its end.
    fn see_through(&mut self, mut machine: Machine) -> Result<Exit> {
        let (Some(mut input), Some(mut output)) = (machine.input.take(), machine.output.take())
        else {
            return Err(failed("reach its console")("there is none"));
        };
        let time = match self.run_time {
            Some(time) => Some(Watchdog::start(machine.pid(), time)?),
            None => None,
        };
        if matches!(self.origin, Origin::Cold { .. }) {
            // A kernel that boots takes what comes too early for its own.
            read_until_ready(&mut output).map_err(|why| Error::NoSnapshot { why })?;
        }
        let mut transcript = Transcript::new(self.most, std::mem::take(&mut self.end));
        // A guest that does not read its input must not keep us from reading its output.
        let message = std::mem::take(&mut self.message);
        let signal = thread::scope(|scope| {
            scope.spawn(move || {
                let _guest_is_gone = input.write_all(&message);
                // Kept open: the end of its console would be the end of QEMU's.
                drop(input);
            });
            let mut chunk = [0; CHUNK];
            while let Ok(n) = output.read(&mut chunk) {
                if n == 0 {
                    return machine.wait();
                }
                if transcript.push(&chunk[..n]) {
                    break;
                }
            }
            // It has said all; its own way out of the machine would be a long one. This also frees
            // a writer that the guest does not read from.
            machine.end()
        })?;
        let (said, code, truncated) = transcript.finish();
        let timed_out = time.is_some_and(|time| time.has_fired());
        let status = match (code, signal) {
            (Some(code), _) => Status::Code(code),
            _ if timed_out => Status::TimedOut,
            (None, Some(signal)) => Status::Signal(signal),
            (None, None) => {
                return Err(Error::HelperGone {
                    what: "qemu",
                    why: "the guest went without a word".to_owned(),
                });
            }
        };
        let mut exit = Exit::new(status);
        exit.truncated = truncated;
        match &mut self.output {
            None => exit.stdout = said,
            Some(None) => {}
            Some(Some(file)) => file
                .write_all(&said)
                .map_err(failed("hand on its output"))?,
        }
        Ok(exit)
    }
}
