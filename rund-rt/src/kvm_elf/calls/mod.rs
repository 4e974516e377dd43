//! The system calls of a guest: what Linux would do, by a deny list of one line: what is not here
//! answers ENOSYS.
//!
//! Nothing that a guest passes is believed. Every pointer goes through
//! [`GuestMemory`](super::memory::GuestMemory), every descriptor through the guest's own
//! [`Table`](table::Table), every path through the [`Layers`](layers::Layers); the host's calls that
//! come of it are those of a process without rights, in a filter.

pub mod account;
pub mod children;
pub mod file;
pub mod layers;
pub mod output;
pub mod path;
pub mod process;
pub mod send;
pub mod signal;
pub mod space;
pub mod table;
pub mod time;

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;

use crate::backend::{SnapshotPoint, Status};

use super::memory::{Fault, GuestMemory};
use account::{Account, Held};
use children::Children;
use layers::Layers;
use output::Outputs;
use process::Identity;
use signal::Signals;
use space::Space;
use table::Table;

/// A system call: its number and arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: u64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// What comes of a system call.
#[derive(Debug)]
pub enum Outcome {
    /// The guest goes on with this in rax.
    Value(i64),
    /// The guest process has ended.
    End(Status),
    /// The guest becomes two processes; the new one has this stack where it is not 0.
    Fork {
        /// Stack pointer of the new process, 0 for the same.
        stack: u64,
        /// Where the new process' id is written in its memory, 0 for nowhere.
        child_id_at: u64,
        /// Where it is written in the old one's.
        parent_id_at: u64,
    },
    /// The guest becomes another program.
    Execute(Box<Execute>),
    /// The guest returns from a signal handler.
    SignalReturn,
    /// The template is to be saved before this call.
    Snapshot,
    /// A signal of the host's interrupted it: the caller looks why, and may call again.
    Interrupted,
}

/// A program, as a part of a file: a template's, or one of the guest's layers.
#[derive(Debug, Clone)]
pub struct Program {
    /// The file.
    pub fd: Rc<OwnedFd>,
    /// Where it begins, at the beginning of a page.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Whether the guest can change it, and so could cut it short beneath a mapping.
    pub changes: bool,
    /// That it is open, where it is of the writable layer.
    pub held: Option<Rc<Held>>,
}

impl Program {
    /// The first bytes, at most `most` of them.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub fn head(&self, most: u64) -> Result<Vec<u8>, Errno> {
        self.bytes(0, self.len.min(most))
    }

    /// `len` bytes from `from` on.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub fn bytes(&self, from: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let at = self.offset.checked_add(from).ok_or(Errno::EINVAL)?;
        let at = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| Errno::ENOMEM)?];
        let mut done = 0;
        while done < bytes.len() {
            match nix::sys::uio::pread(self.fd.as_fd(), &mut bytes[done..], at + done as i64) {
                Ok(0) => return Err(Errno::EIO),
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(why) => return Err(why),
            }
        }
        Ok(bytes)
    }
}

/// The program that a guest becomes.
#[derive(Debug)]
pub struct Execute {
    /// The program.
    pub program: Program,
    /// How it is loaded.
    pub plan: super::elf::LoadPlan,
    /// Its path.
    pub path: Vec<u8>,
    /// Arguments.
    pub args: Vec<Vec<u8>>,
    /// Environment.
    pub env: Vec<Vec<u8>>,
}

/// What Linux would know of a guest process.
#[derive(Debug)]
pub struct Kernel {
    /// Its descriptors.
    pub table: Table,
    /// Its files.
    pub layers: Layers,
    /// Its captured output.
    pub outputs: Outputs,
    /// Its working directory.
    pub cwd: Vec<u8>,
    /// Rights that new files do not get.
    pub umask: u32,
    /// Who it is.
    pub identity: Identity,
    /// Heap and mappings.
    pub space: Space,
    /// Handlers and what is pending.
    pub signals: Signals,
    /// The program that it runs.
    pub program: Program,
    /// That program's path.
    pub program_path: Vec<u8>,
    /// Name of the process, as `prctl` sets it.
    pub name: [u8; 16],
    /// Its children.
    pub children: Children,
    /// What all processes of the sandbox use together.
    pub account: &'static Account,
    /// Whether there ever was another process of this sandbox.
    pub relatives: bool,
    /// While a template is being built: when it is saved.
    pub snapshot: Option<SnapshotPoint>,
    /// Answers so far that would have differed between clones.
    pub draws: u32,
}

/// Answer of a call: a number, or an error for rax.
pub type Answer = Result<i64, Errno>;

impl From<Fault> for Errno {
    fn from(Fault: Fault) -> Self {
        Self::EFAULT
    }
}

impl Kernel {
    /// The files of the writable layer that this process has open.
    fn held(&self) -> impl Iterator<Item = Rc<Held>> {
        let files = self
            .table
            .iter()
            .filter_map(|(_, open)| match &*open.borrow() {
                table::Open::Host(file) => file.held.clone(),
                _ => None,
            });
        let mut seen = Vec::new();
        files.chain(self.program.held.clone()).filter(move |held| {
            let new = !seen.contains(&Rc::as_ptr(held));
            seen.push(Rc::as_ptr(held));
            new
        })
    }

    /// A process that is about to be forked will have open what this one has.
    pub fn share_files(&self) {
        self.held().for_each(|held| held.share());
    }

    /// That process was not made.
    pub fn unshare_files(&self) {
        self.held().for_each(|held| held.unshare());
    }

    /// Closes all files, at the end.
    pub fn close_files(&mut self) {
        self.table.clear();
        self.program.held = None;
    }

    /// Does what the guest asks for.
    pub fn call(&mut self, memory: &GuestMemory, call: Call) -> Outcome {
        if self.saves_before(&call) {
            return Outcome::Snapshot;
        }
        match self.answer(memory, call) {
            Ok(outcome) => outcome,
            Err(Errno::EINTR) => Outcome::Interrupted,
            Err(Errno::EPIPE) => {
                self.signals.raise(libc::SIGPIPE);
                Outcome::Value(-i64::from(libc::EPIPE))
            }
            Err(why) => Outcome::Value(-i64::from(why as i32)),
        }
    }

    /// Whether the template is saved at this call.
    fn saves_before(&mut self, call: &Call) -> bool {
        let Some(point) = self.snapshot else {
            return false;
        };
        let number = i64::try_from(call.number).unwrap_or(-1);
        let from_input = match number {
            libc::SYS_read | libc::SYS_readv => call.args[0] == 0,
            libc::SYS_poll | libc::SYS_ppoll | libc::SYS_select => call.args[1] > 0,
            _ => false,
        };
        // The check of Rust's runtime that descriptors 0 to 2 are open asks for no event.
        let from_input = from_input && !(number == libc::SYS_poll && call.args[2] == 0);
        let identity = matches!(
            number,
            libc::SYS_getrandom
                | libc::SYS_clock_gettime
                | libc::SYS_gettimeofday
                | libc::SYS_time
                | libc::SYS_getpid
                | libc::SYS_gettid
                | libc::SYS_uname
        );
        if identity {
            self.draws = self.draws.saturating_add(1);
        }
        match point {
            SnapshotPoint::Entry => true,
            SnapshotPoint::FirstIdentity => from_input || identity,
            SnapshotPoint::FirstInput => from_input,
        }
    }

    #[allow(
        clippy::too_many_lines,
        reason = "the table of calls is one table, however long"
    )]
    fn answer(&mut self, memory: &GuestMemory, call: Call) -> Result<Outcome, Errno> {
        let Call { number, args } = call;
        let [a, b, c, d, e, _] = args;
        let m = memory;
        let value = match i64::try_from(number).unwrap_or(-1) {
            libc::SYS_read => self.read(m, a, b, c)?,
            libc::SYS_write => self.write(m, a, b, c)?,
            libc::SYS_readv => self.read_vector(m, a, b, c)?,
            libc::SYS_writev => self.write_vector(m, a, b, c)?,
            libc::SYS_pread64 => self.pread(m, a, b, c, d)?,
            libc::SYS_pwrite64 => self.pwrite(m, a, b, c, d)?,
            libc::SYS_sendfile => self.sendfile(m, [a, b, c, d])?,
            libc::SYS_lseek => self.lseek(a, b, c)?,
            libc::SYS_close => self.table.close(a).map(|()| 0)?,
            libc::SYS_dup => self.dup(a, None, false)?,
            libc::SYS_dup2 if a == b => self.table.slot(a).map(|_| b as i64)?,
            libc::SYS_dup2 => self.dup(a, Some(b), false)?,
            libc::SYS_dup3 if a == b => return Err(Errno::EINVAL),
            libc::SYS_dup3 => self.dup(a, Some(b), c & libc::O_CLOEXEC as u64 != 0)?,
            libc::SYS_fcntl => self.fcntl(a, b, c)?,
            libc::SYS_ioctl => self.ioctl(m, a, b, c)?,
            libc::SYS_pipe => self.pipe(m, a, 0)?,
            libc::SYS_pipe2 => self.pipe(m, a, b)?,
            libc::SYS_poll => self.poll(m, a, b, Some(c))?,
            libc::SYS_ppoll => self.ppoll(m, a, b, c)?,
            libc::SYS_select => self.select(m, args)?,
            libc::SYS_fstat => self.fstat(m, a, b)?,
            libc::SYS_ftruncate => self.ftruncate(a, b)?,
            libc::SYS_fsync | libc::SYS_fdatasync => self.table.slot(a).map(|_| 0)?,
            libc::SYS_fadvise64 => self.table.slot(a).map(|_| 0)?,
            libc::SYS_sync => 0,
            libc::SYS_getdents64 => self.getdents(m, a, b, c)?,
            libc::SYS_fchmod => self.fchmod(a, b)?,
            libc::SYS_fchown => self.table.slot(a).map(|_| 0)?,
            libc::SYS_fstatfs => {
                self.table.slot(a)?;
                self.statfs(m, b)?
            }

            libc::SYS_open => self.open(m, AT_FDCWD, a, b, c)?,
            libc::SYS_openat => self.open(m, a, b, c, d)?,
            libc::SYS_creat => self.open(m, AT_FDCWD, a, CREATE, b)?,
            libc::SYS_stat => self.stat(m, AT_FDCWD, a, b, 0)?,
            libc::SYS_lstat => self.stat(m, AT_FDCWD, a, b, NOFOLLOW)?,
            libc::SYS_newfstatat => self.stat(m, a, b, c, d)?,
            libc::SYS_statx => self.statx(m, a, b, c, e)?,
            libc::SYS_statfs => self.statfs_of(m, a, b)?,
            libc::SYS_access => self.access(m, AT_FDCWD, a, b)?,
            libc::SYS_faccessat | libc::SYS_faccessat2 => self.access(m, a, b, c)?,
            libc::SYS_readlink => self.readlink(m, AT_FDCWD, a, b, c)?,
            libc::SYS_readlinkat => self.readlink(m, a, b, c, d)?,
            libc::SYS_getcwd => self.getcwd(m, a, b)?,
            libc::SYS_chdir => self.chdir(m, a)?,
            libc::SYS_fchdir => self.fchdir(a)?,
            libc::SYS_mkdir => self.mkdir(m, AT_FDCWD, a, b)?,
            libc::SYS_mkdirat => self.mkdir(m, a, b, c)?,
            libc::SYS_rmdir => self.unlink(m, AT_FDCWD, a, libc::AT_REMOVEDIR as u64)?,
            libc::SYS_unlink => self.unlink(m, AT_FDCWD, a, 0)?,
            libc::SYS_unlinkat => self.unlink(m, a, b, c)?,
            libc::SYS_rename => self.rename(m, AT_FDCWD, a, AT_FDCWD, b)?,
            libc::SYS_renameat => self.rename(m, a, b, c, d)?,
            libc::SYS_renameat2 if e == 0 => self.rename(m, a, b, c, d)?,
            libc::SYS_symlink => self.symlink(m, a, AT_FDCWD, b)?,
            libc::SYS_symlinkat => self.symlink(m, a, b, c)?,
            libc::SYS_link => self.link(m, [AT_FDCWD, a, AT_FDCWD, b, 0])?,
            libc::SYS_linkat => self.link(m, [a, b, c, d, e])?,
            libc::SYS_chmod => self.chmod(m, AT_FDCWD, a, b)?,
            libc::SYS_fchmodat => self.chmod(m, a, b, c)?,
            libc::SYS_chown => self.exists(m, AT_FDCWD, a, 0)?,
            libc::SYS_lchown => self.exists(m, AT_FDCWD, a, NOFOLLOW)?,
            libc::SYS_fchownat => self.exists(m, a, b, e)?,
            libc::SYS_truncate => self.truncate(m, a, b)?,
            libc::SYS_utimensat => self.utimens(m, a, b, c, d)?,
            libc::SYS_umask => {
                let old = self.umask;
                self.umask = (a & 0o777) as u32;
                i64::from(old)
            }

            libc::SYS_brk => self.space.brk(m, a),
            libc::SYS_mmap => self.mmap(m, args)?,
            libc::SYS_munmap => self.space.unmap(m, a, b)?,
            libc::SYS_mremap => self.space.remap(m, a, b, c, d)?,
            libc::SYS_mprotect if c & libc::PROT_EXEC as u64 == 0 => 0,
            libc::SYS_madvise => self.space.advise(m, a, b, c)?,

            libc::SYS_clock_gettime => time::clock_gettime(m, a, b)?,
            libc::SYS_clock_getres => time::clock_getres(m, a, b)?,
            libc::SYS_gettimeofday => time::gettimeofday(m, a)?,
            libc::SYS_time => time::time(m, a)?,
            libc::SYS_nanosleep => time::sleep(m, libc::CLOCK_MONOTONIC as u64, 0, a)?,
            libc::SYS_clock_nanosleep => time::sleep(m, a, b, c)?,
            libc::SYS_times => time::times(m, a)?,

            libc::SYS_getrandom => process::entropy(m, a, b)?,
            libc::SYS_uname => self.uname(m, a)?,
            libc::SYS_sysinfo => self.sysinfo(m, a)?,
            libc::SYS_getrusage => process::getrusage(m, a, b)?,
            libc::SYS_prlimit64 => self.prlimit(m, a, b, c, d)?,
            libc::SYS_getrlimit => self.prlimit(m, 0, a, 0, b)?,
            libc::SYS_prctl => self.prctl(m, a, b)?,
            libc::SYS_sched_getaffinity => process::affinity(m, b, c)?,
            libc::SYS_sched_yield => 0,
            libc::SYS_getpid | libc::SYS_gettid | libc::SYS_set_tid_address => {
                i64::from(self.identity.pid)
            }
            libc::SYS_getppid => i64::from(self.identity.ppid),
            libc::SYS_getuid | libc::SYS_geteuid => i64::from(self.identity.uid),
            libc::SYS_getgid | libc::SYS_getegid => i64::from(self.identity.gid),
            libc::SYS_getgroups => 0,
            libc::SYS_getpgrp | libc::SYS_getsid | libc::SYS_getpgid | libc::SYS_setsid => {
                i64::from(self.identity.pid)
            }
            libc::SYS_setpgid | libc::SYS_set_robust_list => 0,
            libc::SYS_setuid | libc::SYS_setgid | libc::SYS_setgroups => 0,
            libc::SYS_futex => process::futex(m, a, b, c)?,
            libc::SYS_wait4 => self.wait(m, a, b, c)?,
            libc::SYS_kill => self.kill(a, b)?,
            libc::SYS_tkill => self.kill(a, b)?,
            libc::SYS_tgkill => self.kill(b, c)?,

            libc::SYS_rt_sigaction => self.signals.action(m, a, b, c)?,
            libc::SYS_rt_sigprocmask => self.signals.mask(m, a, b, c)?,
            libc::SYS_sigaltstack => self.signals.stack(m, a, b)?,
            libc::SYS_rt_sigpending => self.signals.pending(m, a)?,
            libc::SYS_rt_sigsuspend => self.suspend(m, a)?,
            libc::SYS_pause => self.wait_for_signal()?,
            libc::SYS_rt_sigreturn => return Ok(Outcome::SignalReturn),

            libc::SYS_fork | libc::SYS_vfork => return self.fork(0, 0, 0),
            libc::SYS_clone => return self.clone_process(args),
            libc::SYS_execve => return self.execve(m, a, b, c),
            libc::SYS_exit | libc::SYS_exit_group => {
                return Ok(Outcome::End(Status::Code((a & 0xff) as i32)));
            }
            _ => {
                tracing::debug!(number, "system call that is not served");
                return Err(Errno::ENOSYS);
            }
        };
        Ok(Outcome::Value(value))
    }
}

/// The working directory, as a descriptor.
const AT_FDCWD: u64 = libc::AT_FDCWD as u64;
/// Not to follow a symbolic link at the end of a path.
const NOFOLLOW: u64 = libc::AT_SYMLINK_NOFOLLOW as u64;
/// What `creat` means.
const CREATE: u64 = (libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC) as u64;

/// A structure of the kernel's interface as bytes, to copy it to a guest.
pub(super) fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: the structures given here are plain numbers of the C library without padding that
    // was never written: the kernel filled them, or they began as zeros.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}
