//! Backend `kvm-elf`: an unmodified static Linux ELF in the user mode of a virtual machine, without
//! a kernel of its own.
//!
//! The owner starts a **zygote** for each template: this program again, with one thread, which
//! gives up everything that it does not need. The zygote makes the template and forks a **virtual
//! machine monitor** for each sandbox, or hands out one that has served before and whose machine
//! was set back. A guest's system calls leave its machine, or are answered inside by a **shim**; the
//! monitor does what Linux would do, for the calls that it knows, on the layers that it was given.
#![allow(unreachable_pub, missing_docs, reason = "nothing in here is public")]

mod builder;
mod calls;
mod channel;
mod clock;
mod confine;
mod cpu;
mod elf;
mod file_layout;
mod fork;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod guest;
mod interrupt;
mod kept;
mod layout;
mod machine;
mod memory;
mod monitor;
mod owner;
mod page_table;
mod reset;
mod shim;
mod stack;
mod template;
mod tree;
mod upper;

mod window;
mod wire;
mod zygote;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};

use carlsbad_types::ByteSize;

use crate::backend::{
    Backend, Capabilities, CloneSpec, Instance, Isolation, Output, Reuse, SavedState,
    SnapshotPoint, Stdin, Template, TemplateSpec,
};
use crate::cgroup::{CgroupLease, CgroupPool};
use crate::error::{Error, Result};

use owner::{Doing, Home, Monitor, Pipes, Zygote, lock, start_zygote};
use template::State;
use upper::UpperBase;
use wire::{Build, Destination, Input, Start};

/// The backend's name.
const BACKEND: &str = "kvm-elf";
/// The most monitors that wait for a clone, of one template.
const MOST_IDLE: usize = 64;

/// Runs a zygote; gives the process' exit code.
pub(crate) fn zygote() -> i32 {
    zygote::run()
}

fn unavailable(why: String) -> Error {
    Error::Unavailable {
        backend: BACKEND,
        why,
        fix: "load the kvm module and join the group of /dev/kvm, or use backend `process` or \
              `qemu`",
    }
}

/// The backend.
///
/// With [`cgroups`](Self::cgroups) each clone leases a control group and has a monitor process of its
/// own ([`Reuse::Fresh`]), since a process that was in a group stays charged to it; its limits of
/// memory and processors are met. Without, a clone with such limits is refused.
#[derive(Debug, Default)]
pub struct KvmElf {
    helper: Option<PathBuf>,
    cgroups: Option<Arc<CgroupPool>>,
}

impl KvmElf {
    /// With helper processes that are this program again ([`init`](crate::init)).
    pub fn new() -> Self {
        Self::default()
    }

    /// With helper processes that are `program`, whose `main` calls [`init`](crate::init).
    #[must_use]
    pub fn helper(mut self, program: impl Into<PathBuf>) -> Self {
        self.helper = Some(program.into());
        self
    }

    /// With control groups from `pool`.
    #[must_use]
    pub fn cgroups(mut self, pool: Arc<CgroupPool>) -> Self {
        self.cgroups = Some(pool);
        self
    }

    /// A zygote and what its guests see.
    fn surroundings(&self, root: Option<&Path>) -> Result<(Zygote, UpperBase)> {
        let lower = root.map(open_directory).transpose()?;
        let upper = UpperBase::new()?;
        let zygote = start_zygote(
            self.helper.as_deref(),
            lower.as_ref().map(AsFd::as_fd),
            Some(&upper),
        )?;
        Ok((zygote, upper))
    }

    fn template(
        mut zygote: Zygote,
        upper: UpperBase,
        state: State,
        file: OwnedFd,
    ) -> Result<Template> {
        zygote.adopt(state.clone(), &file)?;
        let isolation = isolation(&zygote);
        let kept = Kept {
            draws: state.process.draws,
            at_entry: state.snapshot == SnapshotPoint::Entry,
            state,
            pages: File::from(file),
            isolation,
            pool: Arc::new(Pool {
                zygote: Mutex::new(zygote),
                idle: Mutex::new(Vec::new()),
                upper,
                next_pid: AtomicI32::new(2),
            }),
        };
        Ok(Template::new(Arc::new(kept)))
    }
}

fn isolation(zygote: &Zygote) -> Isolation {
    if zygote.confinement.ring0_entry {
        Isolation::HardwareVm
    } else {
        Isolation::PvmVm
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    use nix::sys::stat::Mode;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(|why| Error::io("open", path)(why.into()))
}

fn bytes_of(text: &std::ffi::OsStr) -> Result<Vec<u8>> {
    if text.as_bytes().contains(&0) {
        return Err(Error::BadSetting {
            what: "argument or variable",
            why: format!("{} has a zero in it", text.display()),
        });
    }
    Ok(text.as_bytes().to_vec())
}

fn all_bytes(texts: &[std::ffi::OsString]) -> Result<Vec<Vec<u8>>> {
    texts.iter().map(|text| bytes_of(text)).collect()
}

impl Backend for KvmElf {
    fn name(&self) -> &'static str {
        BACKEND
    }

    fn probe(&self) -> Result<Capabilities> {
        let (zygote, _upper) = self.surroundings(None)?;
        let mut found = Capabilities::new(BACKEND, isolation(&zygote));
        let confinement = &zygote.confinement;
        found.details = vec![
            if confinement.ring0_entry {
                "KVM on VMX or SVM: system calls enter at privilege 0 and leave by sysretq".into()
            } else {
                "KVM of the PVM type: system calls enter at privilege 3".into()
            },
            format!("landlock rules in force: {}", confinement.landlock),
            format!("seccomp filter in force: {}", confinement.seccomp),
            format!("capabilities dropped: {}", confinement.capabilities_dropped),
        ];
        Ok(found)
    }

    fn build_template(&self, spec: &TemplateSpec) -> Result<Template> {
        let program = File::open(&spec.program).map_err(|why| Error::BadProgram {
            program: spec.program.display().to_string(),
            why: why.to_string(),
        })?;
        let (mut zygote, upper) = self.surroundings(spec.root.as_deref())?;
        let file = template::new_file().map_err(|why| Error::io("make", "memfd")(why.into()))?;
        // As `/proc/self/exe` shows it: from the root on.
        let inside = match &spec.inside {
            Some(inside) => Path::new("/").join(inside),
            None => std::path::absolute(&spec.program).map_err(Error::io("find", &spec.program))?,
        };
        let build = Build {
            program_path: bytes_of(inside.as_os_str())?,
            args: all_bytes(&spec.args)?,
            env: all_bytes(&spec.env)?,
            cwd: bytes_of(spec.cwd.as_os_str())?,
            memory: spec.memory.get(),
            snapshot: spec.snapshot,
            deadline: spec.deadline,
        };
        let state = zygote
            .build(build, &program, &file)
            .map_err(|why| match why {
                Error::BadProgram { why, .. } => Error::BadProgram {
                    program: spec.program.display().to_string(),
                    why,
                },
                other => other,
            })?;
        template::seal(&file).map_err(|why| Error::io("seal", "memfd")(why.into()))?;
        Self::template(zygote, upper, state, file)
    }

    fn load_template(&self, path: &Path, root: Option<&Path>) -> Result<Template> {
        let (state, file) = template::load(path)?;
        let (zygote, upper) = self.surroundings(root)?;
        let template = Self::template(zygote, upper, state, file)?;
        // A monitor says whether the processor is the same: now, not at the first clone.
        prewarm(&template, 1).map_err(|why| match why {
            Error::Refused(why) => Error::BadTemplate {
                path: path.into(),
                why,
            },
            other => other,
        })?;
        Ok(template)
    }

    fn prewarm(&self, template: &Template, clones: usize) -> Result<()> {
        prewarm(template, clones)
    }

    fn clone_from(&self, template: &Template, spec: CloneSpec) -> Result<Box<dyn Instance>> {
        let kept = kept(template)?;
        if !kept.at_entry && (spec.args.is_some() || spec.env.is_some()) {
            return Err(Error::BadSetting {
                what: "arguments of a clone",
                why: "the template was saved after its program had read them".into(),
            });
        }
        if spec.root.is_some() {
            return Err(Error::BadSetting {
                what: "root of a clone",
                why: "with backend kvm-elf a clone's root is its template's".into(),
            });
        }
        let cgroup = match &self.cgroups {
            Some(pool) => Some(pool.lease(&spec.limits)?),
            None if spec.limits.memory.is_some() || spec.limits.cpus.is_some() => {
                return Err(Error::NoController {
                    what: "memory and processors",
                    why: "the backend has no pool of control groups; give it one by `cgroups`"
                        .into(),
                });
            }
            None => None,
        };
        let mut prepared = Prepared::new(spec, &kept.pool)?;
        if cgroup.is_some() {
            prepared.start.reuse = Reuse::Fresh;
        }
        kept.start(prepared, cgroup)
    }
}

fn kept(template: &Template) -> Result<&Kept> {
    template.state::<Kept>().ok_or(Error::ForeignTemplate {
        built_by: template.backend(),
        backend: BACKEND,
    })
}

fn prewarm(template: &Template, clones: usize) -> Result<()> {
    let pool = &kept(template)?.pool;
    let mut new = Vec::new();
    for _ in lock(&pool.idle).len()..clones {
        new.push(lock(&pool.zygote).spawn()?);
    }
    for monitor in &mut new {
        monitor.get_ready()?;
    }
    lock(&pool.idle).append(&mut new);
    Ok(())
}

/// What this backend keeps of a template.
#[derive(Debug)]
struct Kept {
    state: State,
    pages: File,
    draws: u32,
    at_entry: bool,
    isolation: Isolation,
    pool: Arc<Pool>,
}

/// Monitors of one template.
#[derive(Debug)]
struct Pool {
    // In this order: monitors are let go before their zygote.
    idle: Mutex<Vec<Monitor>>,
    zygote: Mutex<Zygote>,
    upper: UpperBase,
    next_pid: AtomicI32,
}

impl Home for Pool {
    fn take_back(&self, monitor: Monitor) {
        let mut idle = lock(&self.idle);
        if idle.len() < MOST_IDLE {
            idle.push(monitor);
        } else {
            self.upper.remove(monitor.pid());
        }
    }

    fn clean_up(&self, pid: i32) {
        self.upper.remove(pid);
    }
}

impl Kept {
    fn start(&self, prepared: Prepared, cgroup: Option<CgroupLease>) -> Result<Box<dyn Instance>> {
        let Prepared { start, fds, pipes } = prepared;
        let waiting = {
            let mut idle = lock(&self.pool.idle);
            match start.reuse {
                Reuse::Reset => next(&mut idle, |gone| self.pool.upper.remove(gone)),
                Reuse::Fresh => {
                    let unused = idle.iter().position(|monitor| !monitor.has_served);
                    unused.map(|at| idle.swap_remove(at))
                }
            }
        };
        let mut monitor = match waiting {
            Some(monitor) => monitor,
            None => lock(&self.pool.zygote).spawn()?,
        };
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        if let Some(cgroup) = &cgroup {
            cgroup.add(monitor.pid().unsigned_abs())?;
        }
        monitor.start(start, &fds)?;
        let home: Arc<dyn Home> = Arc::clone(&self.pool) as Arc<dyn Home>;
        Ok(Box::new(owner::Clone::new(
            monitor,
            home,
            pipes,
            self.isolation,
            cgroup,
        )))
    }
}

/// Takes the monitor that is soonest ready: of those that wait the last to come back, whose memory
/// is still in the caches. Those that have ended are given to `remove` by their numbers.
fn next(idle: &mut Vec<Monitor>, remove: impl Fn(i32)) -> Option<Monitor> {
    for i in (0..idle.len()).rev() {
        match idle.get_mut(i)?.look() {
            Doing::Waits => return Some(idle.remove(i)),
            Doing::Prepares => {}
            Doing::Nothing => remove(idle.remove(i).pid()),
        }
    }
    (!idle.is_empty()).then(|| idle.remove(0))
}

impl SavedState for Kept {
    fn backend(&self) -> &'static str {
        BACKEND
    }

    fn size(&self) -> ByteSize {
        ByteSize::new(self.state.extents.iter().map(|extent| extent.len).sum())
    }

    fn shared_draws(&self) -> u32 {
        self.draws
    }

    fn save(&self, path: &Path) -> Result<()> {
        template::save(&self.state, &self.pages, path)
    }
}

/// A clone's wishes, and the descriptors that go with them.
struct Prepared {
    start: Start,
    fds: Vec<OwnedFd>,
    pipes: Pipes,
}

impl Prepared {
    fn new(spec: CloneSpec, pool: &Pool) -> Result<Self> {
        let mut fds = Vec::new();
        let mut pipes = Pipes::default();
        let no_pipe = |why: nix::errno::Errno| Error::io("make", "a pipe")(why.into());
        let stdin = match spec.stdin {
            Stdin::Null => Input::Null,
            Stdin::Bytes(bytes) if bytes.len() > MOST_INPUT => {
                fds.push(file_of(&bytes).map_err(Error::io("make", "memfd"))?);
                Input::Descriptor
            }
            Stdin::Bytes(bytes) => Input::Bytes(bytes),
            Stdin::Piped => {
                let (read, write) =
                    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(no_pipe)?;
                fds.push(read);
                pipes.stdin = Some(write.into());
                Input::Descriptor
            }
            Stdin::File(file) => {
                fds.push(file);
                Input::Descriptor
            }
        };
        let mut output = |output: Output, ours: &mut Option<File>| {
            Ok(match output {
                Output::Capture => Destination::Captured,
                Output::Null => Destination::Null,
                Output::Piped => {
                    let (read, write) =
                        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(no_pipe)?;
                    fds.push(write);
                    *ours = Some(read.into());
                    Destination::Descriptor
                }
                Output::File(file) => {
                    fds.push(file);
                    Destination::Descriptor
                }
            })
        };
        let stdout = output(spec.stdout, &mut pipes.stdout)?;
        let stderr = output(spec.stderr, &mut pipes.stderr)?;
        let asked = calls::time::now(libc::CLOCK_MONOTONIC as u64);
        let next_pid = || {
            let pid = pool.next_pid.fetch_add(1, Ordering::Relaxed);
            // As on Linux, ids begin again.
            2 + (pid - 2).rem_euclid(32_766)
        };
        Ok(Self {
            start: Start {
                asked: asked.tv_sec as u64 * 1_000_000_000 + asked.tv_nsec as u64,
                host_name: spec.id.unwrap_or_default(),
                pid: next_pid(),
                args: spec.args.as_deref().map(all_bytes).transpose()?,
                env: spec.env.as_deref().map(all_bytes).transpose()?,
                cwd: spec.cwd.map(|cwd| bytes_of(cwd.as_os_str())).transpose()?,
                stdin,
                stdout,
                stderr,
                run_time: spec.limits.run_time,
                upper: spec.limits.upper.get(),
                output: spec.limits.output.get(),
                processes: spec.limits.processes.unwrap_or(DEFAULT_PROCESSES),
                reuse: spec.reuse,
                verify: spec.verify_reset,
            },
            fds,
            pipes,
        })
    }
}

/// Processes of a sandbox where no limit is set.
const DEFAULT_PROCESSES: u32 = 64;

/// The most bytes of standard input that go to a monitor in a message; more are a file.
const MOST_INPUT: usize = 1 << 20;

/// A file in memory that holds `bytes`, to be read from its beginning.
fn file_of(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    use std::io::{Seek, Write};
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let mut file = File::from(nix::sys::memfd::memfd_create(c"stdin", flags)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}
