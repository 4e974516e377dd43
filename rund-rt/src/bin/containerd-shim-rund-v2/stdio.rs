//! A container's input and output: the pipes that containerd has made, by their names.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rund_rt::{Output, Stdin};

/// How long the other side of an output pipe may take to open it.
const READER: Duration = Duration::from_secs(10);
/// How often a reader of standard input looks whether it is still wanted.
const LOOK_UP_MS: u16 = 200;
const CHUNK: usize = 1 << 16;

/// The names of a process' pipes; empty where it has none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Names {
    pub(crate) fn input(&self) -> Stdin {
        if self.stdin.is_empty() {
            Stdin::Null
        } else {
            Stdin::Piped
        }
    }
}

/// Where output goes: into the pipe or file of that name. Where that is a pipe, a reader of it
/// comes too: while that is open, a program whose output nobody reads any more (of a detached
/// container, say) waits when the pipe is full, as with runc, rather than end with SIGPIPE.
pub(crate) fn output(name: &str) -> Result<(Output, Option<File>)> {
    if name.is_empty() {
        return Ok((Output::Null, None));
    }
    let path = Path::new(name.strip_prefix("file://").unwrap_or(name));
    let start = Instant::now();
    loop {
        // Not blocking: nobody may ever read.
        let opened = OpenOptions::new()
            .append(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        match opened {
            Ok(file) => {
                blocking(&file)?;
                let is_pipe = file.metadata()?.file_type().is_fifo();
                let reader = is_pipe.then(|| open_to_read(name)).transpose()?;
                return Ok((Output::File(OwnedFd::from(file)), reader));
            }
            Err(why) if why.raw_os_error() == Some(libc::ENXIO) && start.elapsed() < READER => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(why) => return Err(why).with_context(|| format!("open {name} for output")),
        }
    }
}

/// Opens a pipe to read from, whether or not anybody writes into it.
fn open_to_read(name: &str) -> Result<File> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(name);
    opened.with_context(|| format!("open {name} to read"))
}

fn blocking(file: &File) -> Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK))?;
    Ok(())
}

/// A thread that carries a pipe's bytes to a sandbox's standard input, and ends with either.
#[derive(Debug)]
pub(crate) struct Carrier {
    unwanted: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Carrier {
    pub(crate) fn start(name: &str, to: File) -> Result<Self> {
        let from = open_to_read(name)?;
        let unwanted = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&unwanted);
        let thread = thread::Builder::new()
            .name("rund-stdin".to_owned())
            .spawn(move || {
                // Where the sandbox reads no more, nobody is to be told.
                let _gone = carry(from, to, &flag);
            })?;
        Ok(Self {
            unwanted,
            thread: Some(thread),
        })
    }

    /// What is in the pipe is still carried; more is not waited for.
    pub(crate) fn close(&self) {
        self.unwanted.store(true, Ordering::Relaxed);
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.close();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn carry(mut from: File, mut to: File, unwanted: &AtomicBool) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let (reads, ends) = {
            // A pipe that nobody has opened yet has no end; one that was closed says so.
            let mut watched = [
                PollFd::new(from.as_fd(), PollFlags::POLLIN),
                PollFd::new(to.as_fd(), PollFlags::empty()),
            ];
            poll(&mut watched, PollTimeout::from(LOOK_UP_MS))?;
            let has = |at: usize, what: PollFlags| {
                let events: Option<PollFlags> = watched[at].revents();
                events.is_some_and(|events| events.intersects(what))
            };
            let closed = has(0, PollFlags::POLLHUP) || has(1, PollFlags::POLLERR);
            (has(0, PollFlags::POLLIN), closed)
        };
        if reads {
            match from.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => to.write_all(&chunk[..n])?,
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => {}
                Err(why) => return Err(why),
            }
        } else if ends || unwanted.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
}
