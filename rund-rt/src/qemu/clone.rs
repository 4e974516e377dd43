//! A machine in somebody's hands.

use std::fs::File;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use carlsbad_types::ByteSize;
use serde_json::json;

use super::agent::Identity;
use super::guest::end_mark;
use super::job::{Begun, Job, Origin, Shared};
use super::machine::{Monitor, failed};
use super::watchdog::Handle;
use super::{BACKEND, START, held, isolation, private_pages};
use crate::backend::{
    CloneSpec, Exit, Instance, Kill, KillHandle, Output, Stats, Stdin, TemplateSpec,
};
use crate::error::{Error, Result};

/// Starts a machine, and gives it its command.
pub(super) fn begin(
    origin: Origin,
    spec: &TemplateSpec,
    clone: CloneSpec,
) -> Result<Box<dyn Instance>> {
    let asked = Instant::now();
    let input = match clone.stdin {
        Stdin::Null => Vec::new(),
        Stdin::Bytes(bytes) => bytes,
        _ => {
            return Err(unsupported(
                "a standard input that is not known at the start",
            ));
        }
    };
    let output = match clone.stdout {
        Output::Capture => None,
        Output::Null => Some(None),
        Output::File(file) => Some(Some(File::from(file))),
        Output::Piped => return Err(unsupported("output by a pipe")),
    };
    if clone.limits.memory.is_some() || clone.limits.cpus.is_some() {
        return Err(Error::NoController {
            what: "memory or processors",
            why: "backend qemu enters no control group: give its process to a lease".to_owned(),
        });
    }
    if clone.root.is_some() {
        return Err(Error::BadSetting {
            what: "a clone's root",
            why: "backend qemu has its template's, which its kernel has mounted".to_owned(),
        });
    }
    let id = clone
        .id
        .unwrap_or_else(|| format!("{:016x}", fastrand::u64(..)));
    let mut seed = [0; 32];
    rustix::rand::getrandom(&mut seed[..], rustix::rand::GetRandomFlags::empty())
        .map_err(failed("draw entropy"))?;
    let end = end_mark(fastrand::u64(..));
    let message = Identity {
        id: &id,
        seed,
        now: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default(),
        args: clone.args.as_ref().unwrap_or(&spec.args),
        env: clone.env.as_ref().unwrap_or(&spec.env),
        cwd: clone.cwd.as_ref().unwrap_or(&spec.cwd),
        input: &input,
        end: &end,
    }
    .message()?;
    let (template_hit, split_rootfs) = match &origin {
        Origin::Template(saved) => (true, saved.shape.root.is_some()),
        Origin::Cold { shape, .. } => (false, shape.root.is_some()),
    };
    let shared = Arc::new(Shared::default());
    let (says, begun) = channel();
    let job = Job {
        origin,
        message,
        end,
        output,
        most: clone.limits.output,
        run_time: clone.limits.run_time,
        shared: Arc::clone(&shared),
    };
    let thread = match &job.origin {
        Origin::Template(saved) => Arc::clone(saved).held.start(job, says),
        Origin::Cold { .. } => held::start(job, says),
    }?;
    let (pid, monitor) = hear(&begun)?;
    let stats = Stats {
        backend: BACKEND.to_owned(),
        isolation: Some(isolation()),
        template_hit,
        split_rootfs,
        pid: Some(pid),
        start: asked.elapsed(),
        ..Stats::default()
    };
    Ok(Box::new(Clone {
        pid,
        kill: Arc::new(Handle::of(pid)?),
        monitor: Mutex::new(monitor),
        began: Instant::now(),
        stats,
        shared,
        thread: Some(thread),
    }))
}

fn hear(begun: &Receiver<Begun>) -> Begun {
    match begun.recv_timeout(START * 2) {
        Ok(begun) => begun,
        Err(why) => Err(failed("start")(why)),
    }
}

fn unsupported(what: &'static str) -> Error {
    Error::BadSetting {
        what,
        why: "backend qemu has one serial line".to_owned(),
    }
}

/// A running clone.
#[derive(Debug)]
struct Clone {
    pid: u32,
    kill: Arc<Handle>,
    monitor: Mutex<Monitor>,
    began: Instant,
    stats: Stats,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Clone {
    fn command(&self, command: &str) -> Result<()> {
        let mut monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        monitor.run(command, &json!({})).map(|_| ())
    }
}

impl Instance for Clone {
    fn wait(&self, deadline: Option<Duration>) -> Result<Exit> {
        let start = Instant::now();
        let mut end = self.shared.lock();
        loop {
            match &*end {
                Some(Ok(exit)) => {
                    let mut exit = exit.clone();
                    exit.stats = self.stats.clone();
                    exit.stats.run = self.began.elapsed();
                    return Ok(exit);
                }
                Some(Err(why)) => {
                    return Err(Error::HelperGone {
                        what: "qemu",
                        why: why.clone(),
                    });
                }
                None => {}
            }
            let left = deadline.map(|deadline| deadline.saturating_sub(start.elapsed()));
            end = match left {
                Some(left) if left.is_zero() => {
                    return Err(Error::DeadlineExceeded {
                        what: "the guest's end",
                        deadline: deadline.unwrap_or_default(),
                    });
                }
                Some(left) => {
                    let waited = self.shared.changed.wait_timeout(end, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.shared.changed.wait(end);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    fn kill_handle(&self) -> KillHandle {
        KillHandle::new(Arc::clone(&self.kill) as Arc<dyn Kill>)
    }

    fn stats(&self) -> Result<Stats> {
        let mut stats = self.stats.clone();
        stats.run = self.began.elapsed();
        if stats.template_hit {
            // Of one that has ended there is nothing to count.
            stats.dirty_pages = private_pages::count(self.pid).unwrap_or_default();
        }
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid));
        stats.pss = text.ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("Pss:"))?;
            let kib = line.split_whitespace().nth(1)?.parse().ok()?;
            Some(ByteSize::kib(kib))
        });
        Ok(stats)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }

    fn pause(&self) -> Result<()> {
        self.command("stop")
    }

    fn resume(&self) -> Result<()> {
        self.command("cont")
    }

    fn take_stdin(&self) -> Option<File> {
        None
    }

    fn take_stdout(&self) -> Option<File> {
        None
    }

    fn take_stderr(&self) -> Option<File> {
        None
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _gone = self.kill.kill();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
