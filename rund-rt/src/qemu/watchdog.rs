//! Ending a machine's process: by its handle, and when its time is over.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::machine::failed;
use crate::backend::Kill;
use crate::error::Result;

/// A process, which no other takes the place of.
#[derive(Debug)]
pub(super) struct Handle(OwnedFd);

impl Handle {
    pub(super) fn of(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| failed("find its process")("no id"))?;
        let process = pidfd_open(pid, PidfdFlags::empty());
        Ok(Self(process.map_err(failed("find its process"))?))
    }
}

impl Kill for Handle {
    fn kill(&self) -> Result<()> {
        match pidfd_send_signal(&self.0, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(why) => Err(failed("kill it")(std::io::Error::from(why))),
        }
    }
}

/// Kills a process when its time is over. Its thread is joined when it is dropped.
pub(super) struct Watchdog {
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    fired: Arc<Mutex<bool>>,
}

impl Watchdog {
    pub(super) fn start(pid: u32, patience: Duration) -> Result<Self> {
        let handle = Handle::of(pid)?;
        let (done, waits) = channel();
        let fired = Arc::new(Mutex::new(false));
        let flag = Arc::clone(&fired);
        let thread = thread::Builder::new()
            .name("rund-qemu-time".to_owned())
            .spawn(move || {
                if waits.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    *flag.lock().unwrap_or_else(PoisonError::into_inner) = true;
                    let _gone = handle.kill();
                }
            })
            .map_err(failed("watch its time"))?;
        Ok(Self {
            done: Some(done),
            thread: Some(thread),
            fired,
        })
    }

    pub(super) fn has_fired(&self) -> bool {
        *self.fired.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.done.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
