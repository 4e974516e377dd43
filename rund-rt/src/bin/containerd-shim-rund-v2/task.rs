//! Containers, and the processes in them.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containerd_shim::api::Status;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use rund_rt::oci::Bundle;
use rund_rt::rootfs::Rootfs;
use rund_rt::{CloneSpec, Instance, KillHandle, TemplateSpec};

use crate::stdio::{Carrier, Names};

/// A container: a bundle, where needed a root of its own, and its processes by exec id; the first has none.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: Bundle,
    pub(crate) backend: &'static str,
    /// None where the backend joins the layers itself, or the bundle's root is read-only.
    pub(crate) root: Option<Rootfs>,
    pub(crate) processes: Mutex<HashMap<String, Arc<Process>>>,
}

/// A process in a container.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) exec_id: String,
    pub(crate) names: Names,
    pub(crate) template: TemplateSpec,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    phase: Phase,
    /// What it will be started with, until it is.
    pub(crate) clone: Option<CloneSpec>,
    pub(crate) pid: u32,
    pub(crate) running: Option<Running>,
    /// The signal that was asked for, which is what an exit by SIGKILL then stands for.
    asked: Option<i32>,
    pub(crate) end: Option<End>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Created,
    Running,
    Paused,
    Stopped,
}

/// What a running process has.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) instance: Arc<dyn Instance>,
    pub(crate) carrier: Option<Carrier>,
    /// Held open: see [`output`](crate::stdio::output).
    pub(crate) _readers: [Option<File>; 2],
}

/// How a process ended, and when.
#[derive(Debug, Clone)]
pub(crate) struct End {
    pub(crate) code: u32,
    pub(crate) at: Timestamp,
}

impl Process {
    pub(crate) fn new(
        exec_id: &str,
        names: Names,
        template: TemplateSpec,
        clone: CloneSpec,
    ) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            names,
            template,
            state: Mutex::new(State {
                clone: Some(clone),
                ..State::default()
            }),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn began(&self, pid: u32, running: Running) {
        let mut state = self.lock();
        state.phase = Phase::Running;
        state.pid = pid;
        state.running = Some(running);
    }

    /// It will never begin, and has ended with this code; nothing where it has begun, or is about to
    /// and has not `failed`.
    pub(crate) fn give_up(&self, code: i32, failed: bool, at: Timestamp) -> Option<End> {
        {
            let mut state = self.lock();
            let waits = state.clone.take().is_some();
            if state.phase != Phase::Created || !(waits || failed) {
                return None;
            }
        }
        Some(self.ended(code, false, at))
    }

    /// It has ended with this code; one that was asked to end by a signal has ended by that.
    pub(crate) fn ended(&self, code: i32, killed: bool, at: Timestamp) -> End {
        let (end, running) = {
            let mut state = self.lock();
            let asked = state.asked.filter(|_| killed);
            let code = asked.map_or(code, |signal| 128 + signal);
            let end = End {
                code: code.unsigned_abs(),
                at,
            };
            state.phase = Phase::Stopped;
            state.end = Some(end.clone());
            (end, state.running.take())
        };
        // What it had goes back before anybody hears of its end.
        drop(running);
        self.changed.notify_all();
        end
    }

    pub(crate) fn wait(&self) -> End {
        let mut state = self.lock();
        loop {
            if let Some(end) = &state.end {
                return end.clone();
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn wait_at_most(&self, patience: Duration) -> Option<End> {
        let start = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(end) = &state.end {
                return Some(end.clone());
            }
            let left = patience.checked_sub(start.elapsed())?;
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn status(&self) -> Status {
        match self.lock().phase {
            Phase::Created => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
            Phase::Stopped => Status::STOPPED,
        }
    }

    pub(crate) fn is_alive(&self) -> bool {
        matches!(self.lock().phase, Phase::Running | Phase::Paused)
    }

    /// The handle that ends it, where it runs.
    pub(crate) fn ask_to_end(&self, signal: i32) -> Option<KillHandle> {
        let mut state = self.lock();
        let handle = state.running.as_ref()?.instance.kill_handle();
        state.asked = Some(signal);
        Some(handle)
    }

    /// Stops it where it is, or lets it go on; whether it ran.
    pub(crate) fn pause(&self, paused: bool) -> rund_rt::Result<bool> {
        let mut state = self.lock();
        let Some(running) = &state.running else {
            return Ok(false);
        };
        if paused {
            running.instance.pause()?;
        } else {
            running.instance.resume()?;
        }
        state.phase = if paused {
            Phase::Paused
        } else {
            Phase::Running
        };
        Ok(true)
    }

    /// Closes its standard input behind what is there.
    pub(crate) fn close_input(&self) {
        if let Some(running) = &self.lock().running
            && let Some(carrier) = &running.carrier
        {
            carrier.close();
        }
    }
}

impl Container {
    pub(crate) fn processes(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        self.processes().get(exec_id).cloned()
    }

    /// Ends all of its processes but the first, and waits for their ends for a while.
    pub(crate) fn end_others(&self, patience: Duration) -> rund_rt::Result<()> {
        let all = self.all();
        let others = all.iter().filter(|process| !process.exec_id.is_empty());
        for other in others {
            if let Some(handle) = other.ask_to_end(libc::SIGKILL) {
                // A stopped one would not die.
                other.pause(false)?;
                handle.kill()?;
                other.wait_at_most(patience);
            }
        }
        Ok(())
    }

    /// All of its processes.
    pub(crate) fn all(&self) -> Vec<Arc<Process>> {
        self.processes().values().cloned().collect()
    }
}
