//! A virtual machine monitor: one process, one machine, one sandbox at a time.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::backend::{Reuse, Status};

use super::builder::new_kernel;
use super::calls::account::{Account, Lock};
use super::calls::file::{directory, share};
use super::calls::layers::{Layers, Upper, duplicate};
use super::calls::output::Outputs;
use super::calls::path::regular;
use super::calls::process::{Identity, joined};
use super::calls::table::{HostFile, Open};
use super::calls::{Kernel, Program};
use super::channel::{Channel, Lost};
use super::cpu;
use super::guest::{End, Guest, Image, fill_random};
use super::interrupt;
use super::layout::Layout;
use super::machine::{Machine, Registers};
use super::memory::GuestMemory;
use super::reset;
use super::shim::{Return, data};
use super::template::{Pages, SavedOpen, State};
use super::upper::layer_name;
use super::window::Windows;
use super::wire::{Destination, Ended, FromMonitor, Input, Start, ToMonitor};
use super::zygote::Surroundings;

/// A template in a zygote.
#[derive(Debug)]
pub struct Template {
    state: State,
    file: Rc<OwnedFd>,
    pages: Pages,
    layout: Layout,
}

impl Template {
    /// A template whose pages are in `file`.
    ///
    /// # Errors
    /// Where its description cannot be.
    pub fn new(state: State, file: OwnedFd, pages: Pages) -> Result<Self, String> {
        let len = nix::sys::stat::fstat(&file).map_err(|why| why.to_string())?;
        state.check(u64::try_from(len.st_size).unwrap_or(0))?;
        let layout = Layout::new(&state.plan, carlsbad_types::ByteSize::new(state.memory))?;
        Ok(Self {
            state,
            file: Rc::new(file),
            pages,
            layout,
        })
    }

    /// The program's own file.
    fn program(&self) -> Program {
        Program {
            fd: Rc::clone(&self.file),
            offset: self.state.program.0,
            len: self.state.program.1,
            changes: false,
            held: None,
        }
    }
}

/// Runs a monitor until the owner is gone; gives the process' exit code.
pub fn run(surroundings: &Rc<Surroundings>, template: &Rc<Template>, owner: Channel) -> i32 {
    let _only_a_name = nix::sys::prctl::set_name(c"rund-monitor");
    let mut monitor = match Monitor::new(surroundings, template) {
        Ok(monitor) => monitor,
        Err(why) => {
            let _gone = owner.send(&FromMonitor::Failed(why), &[]);
            return 1;
        }
    };
    if owner.send(&FromMonitor::Ready, &[]).is_err() {
        return 0;
    }
    let owner = Rc::new(std::cell::RefCell::new(owner));
    loop {
        let received = owner.borrow_mut().receive::<ToMonitor>(None);
        match received {
            Ok((ToMonitor::Equip, fds)) => {
                // Before Linux 6.7 it cannot be asked for pages that differ: a machine serves once.
                let can = |map: &OwnedFd| reset::own_pages(map, &monitor.guest.memory).is_ok();
                monitor.pagemap = fds.into_iter().next().filter(can);
            }
            Ok((ToMonitor::Start(start), fds)) => {
                if !monitor.serve(*start, fds, &owner) {
                    return 0;
                }
            }
            Err(Lost::Interrupted) => {}
            Err(_) => {
                monitor.guest.kernel.layers.delete();
                return 0;
            }
        }
    }
}

struct Monitor {
    guest: Guest,
    template: Rc<Template>,
    /// The registers of the template.
    registers: Registers,
    pagemap: Option<OwnedFd>,
    served: u64,
}

impl Monitor {
    fn new(surroundings: &Surroundings, template: &Rc<Template>) -> Result<Self, String> {
        interrupt::install().map_err(|why| why.to_string())?;
        let state = &template.state;
        let way_back = surroundings.way_back;
        if state.processor != surroundings.host.processor()
            || state.sysret != (way_back == Return::Sysret)
        {
            return Err("the template was built on another processor".into());
        }
        let layout = template.layout.clone();
        let memory = GuestMemory::new(&layout).map_err(|why| format!("no memory: {why}"))?;
        memory
            .lay(&*template.file, &state.extents)
            .map_err(|why| format!("the template's pages: {why}"))?;
        let mut machine = Machine::new(&surroundings.host, &memory, state.root, way_back)
            .map_err(|why| why.to_string())?;
        let registers = match &state.registers {
            Some(saved) => saved.clone(),
            None => machine.save().map_err(|why| why.to_string())?,
        };
        machine.restore(&registers).map_err(|why| why.to_string())?;
        let kernel = kernel(surroundings, template)?;
        Ok(Self {
            guest: Guest {
                machine,
                memory,
                kernel,
                image: Image {
                    plan: state.plan.clone(),
                    layout,
                },
                root: state.root,
                unused_tables: 0,
                tables_overwritten: false,
                host: Rc::clone(&surroundings.host),
                way_back,
                windows: Windows::default(),
                exits: 0,
                is_template: true,
                is_child: false,
                report: None,
            },
            template: Rc::clone(template),
            registers,
            pagemap: None,
            served: 0,
        })
    }

    /// Runs one clone. Says whether the monitor goes on.
    fn serve(
        &mut self,
        start: Start,
        fds: Vec<OwnedFd>,
        owner: &Rc<std::cell::RefCell<Channel>>,
    ) -> bool {
        let (reuse, verify) = (start.reuse, start.verify);
        let run_time = start.run_time;
        let asked = start.asked;
        if let Err(why) = self.prepare(start, fds, owner) {
            let _gone = owner.borrow().send(&FromMonitor::Failed(why), &[]);
            self.guest.kernel.layers.delete();
            return false;
        }
        interrupt::watch(self.guest.machine.immediate_exit());
        interrupt::set(run_time);
        let began = Instant::now();
        let end = self.guest.run();
        interrupt::stop();
        let took = began.elapsed();
        if self.guest.is_child {
            self.guest.end_child(end);
        }
        let status = match end {
            End::Status(status) => status,
            End::Snapshot => Status::Signal(libc::SIGSYS),
            End::Broken(why) => {
                let _gone = owner.borrow().send(&FromMonitor::Failed(why), &[]);
                self.guest.kernel.layers.delete();
                return false;
            }
        };
        // Before the end is told: what they still write is this clone's. Those that have said how
        // they end write nothing any more.
        let children = &mut self.guest.kernel.children;
        let alone = children.len() == 0 || children.end();
        // Who kills it waits for the end of this process.
        let goes_on =
            reuse == Reuse::Reset && self.pagemap.is_some() && alone && !interrupt::was_killed();
        let [stdout, stderr] = self.guest.kernel.outputs.kept();
        let ended = Ended {
            status,
            stdout,
            stderr,
            truncated: self.guest.kernel.account.output.is_truncated(),
            start: Duration::from_nanos(nanoseconds(began).saturating_sub(asked)),
            run: took,
            exits: self.guest.exits,
            served_inside: self.guest.served(),
            split_rootfs: self.guest.kernel.layers.is_split(),
            recycled: self.served > 0,
            goes_on,
            upper: 0,
        };
        // Files and pipes are closed before the end is told.
        self.guest.kernel.close_files();
        let told = owner
            .borrow()
            .send(&FromMonitor::Ended(Box::new(ended)), &[]);
        if told.is_err() || !goes_on {
            self.guest.kernel.layers.delete();
            return false;
        }
        self.served += 1;
        let began = Instant::now();
        match self.reset() {
            Ok(pages) => {
                let took = began.elapsed();
                let differences = if verify {
                    self.differences()
                } else {
                    Vec::new()
                };
                let reset = FromMonitor::Reset {
                    took,
                    pages,
                    differences,
                };
                owner.borrow().send(&reset, &[]).is_ok()
            }
            Err(why) => {
                let _gone = owner.borrow().send(&FromMonitor::Failed(why), &[]);
                self.guest.kernel.layers.delete();
                false
            }
        }
    }

    /// Gives the clone what is its own.
    fn prepare(
        &mut self,
        start: Start,
        fds: Vec<OwnedFd>,
        owner: &Rc<std::cell::RefCell<Channel>>,
    ) -> Result<(), String> {
        let state = &self.template.state;
        let at_entry = state.registers.is_none();
        if !at_entry && (start.args.is_some() || start.env.is_some()) {
            return Err(
                "arguments and environment of a clone can only be its own where the template was \
                 saved at its entry"
                    .into(),
            );
        }
        let mut fds = fds.into_iter();
        let guest = &mut self.guest;
        let kernel = &mut guest.kernel;
        let sink = {
            let owner = Rc::clone(owner);
            Box::new(move |stream: u8, bytes: &[u8]| {
                let message = FromMonitor::Output(stream, bytes.to_vec());
                // The owner may not read as long as it likes.
                let sent = owner
                    .borrow()
                    .send_unless(&message, &[], interrupt::is_over);
                sent.is_ok()
            })
        };
        kernel.account.begin(start.output, start.processes);
        kernel.outputs = Outputs::new(&kernel.account.output, sink);
        let input = match start.stdin {
            Input::Null => Open::Null,
            Input::Bytes(bytes) => Open::Bytes {
                bytes: bytes.into(),
                at: 0,
            },
            Input::Descriptor => given(fds.next())?,
        };
        let mut output = |stream: u8, destination| match destination {
            Destination::Null => Ok(Open::Null),
            Destination::Captured => Ok(Open::Captured(stream)),
            Destination::Descriptor => given(fds.next()),
        };
        let opens = [input, output(1, start.stdout)?, output(2, start.stderr)?];
        for (fd, open) in (0..).zip(opens) {
            let put = kernel.table.replace(fd, share(open), false);
            put.map_err(|why| why.to_string())?;
        }
        reopen(kernel, &state.process.open).map_err(|why| format!("an open file: {why}"))?;
        let args = start.args.unwrap_or_else(|| state.args.clone());
        let env = start.env.unwrap_or_else(|| state.env.clone());
        let mut unique = [0; 16];
        fill_random(&mut unique);
        kernel.identity = Identity {
            pid: start.pid,
            ppid: 0,
            uid: 0,
            gid: 0,
            host_name: start.host_name,
            unique,
            arguments: joined(&args),
        };
        match &start.cwd {
            Some(cwd) => kernel.enter(cwd)?,
            None => kernel.cwd.clone_from(&state.cwd),
        }
        kernel.layers.set_most(start.upper);
        kernel.umask = state.process.umask;
        kernel.signals = state.process.signals.clone();
        kernel.space = state.process.space.clone();
        kernel.name = state.process.name;
        kernel.program_path.clone_from(&state.program_path);
        kernel.relatives = false;
        guest.exits = 0;
        if at_entry {
            let path = state.program_path.clone();
            guest
                .begin(&args, &env, &path)
                .map_err(|why| why.to_string())?;
            // The vectors and segments are the template's already.
        } else {
            guest.publish();
            guest.memory.set_data(data::BRK + 8, state.process.marks.0);
            guest.memory.set_data(data::MMAP, state.process.marks.1);
        }
        if guest.way_back == Return::Jump {
            guest.windows.lay_input(&guest.memory, &guest.kernel);
        }
        Ok(())
    }

    /// Sets everything back to the template; gives how many pages that were.
    fn reset(&mut self) -> Result<u64, String> {
        let guest = &mut self.guest;
        guest.windows.forget();
        if !guest.kernel.children.end() {
            return Err("a process of the guest's does not end".into());
        }
        guest
            .kernel
            .layers
            .reset()
            .map_err(|why| format!("the writable layer: {why}"))?;
        if !guest.is_template {
            return self.go_back();
        }
        let pagemap = self.pagemap.as_ref().ok_or("no page map")?;
        let ranges = reset::own_pages(pagemap, &guest.memory)
            .map_err(|why| format!("the page map: {why}"))?;
        let state = &self.template.state;
        let pages = reset::copy_back(&guest.memory, &ranges, &state.extents, &self.template.pages)
            .map_err(|why| format!("the template's pages: {why}"))?;
        if guest.way_back == Return::Sysret {
            // The last call's instruction would be skipped when the next clone makes the same.
            guest.machine.complete();
        }
        guest
            .machine
            .restore(&self.registers)
            .map_err(|why| why.to_string())?;
        Ok(pages)
    }

    /// Becomes the template again after the guest has become another program.
    fn go_back(&mut self) -> Result<u64, String> {
        let guest = &mut self.guest;
        let template = &self.template;
        if guest.way_back == Return::Sysret {
            guest.machine.complete();
        }
        if guest.tables_overwritten {
            guest.machine.take_memory().map_err(|why| why.to_string())?;
        }
        guest
            .memory
            .renew(&template.layout)
            .and_then(|()| guest.memory.lay(&*template.file, &template.state.extents))
            .map_err(|why| format!("the template's pages: {why}"))?;
        if guest.tables_overwritten {
            guest
                .machine
                .give_memory(&guest.memory)
                .map_err(|why| why.to_string())?;
            guest.tables_overwritten = false;
            guest.unused_tables = 0;
        }
        guest
            .machine
            .restore(&self.registers)
            .map_err(|why| why.to_string())?;
        guest.image = Image {
            plan: template.state.plan.clone(),
            layout: template.layout.clone(),
        };
        guest.root = template.state.root;
        guest.kernel.program = template.program();
        guest.is_template = true;
        Ok(0)
    }

    /// What differs from the template, after a reset.
    fn differences(&mut self) -> Vec<String> {
        let state = &self.template.state;
        let mut found: Vec<String> =
            reset::differences(&self.guest.memory, &state.extents, &self.template.pages)
                .into_iter()
                .map(|offset| format!("the page at {offset:#x}"))
                .collect();
        // The registers are set when the machine is entered; a call that never was is made by a
        // signal that is there already.
        self.guest.machine.complete();
        match self.guest.machine.save() {
            Ok(now) => {
                let parts = self.guest.host.vector_parts();
                found.extend(compare(&self.registers, &now, &parts));
            }
            Err(why) => found.push(why.to_string()),
        }
        // Reading them has not changed them; the next entry sets them all the same.
        if let Err(why) = self.guest.machine.restore(&self.registers) {
            found.push(why.to_string());
        }
        found
    }
}

/// Names of registers that differ.
fn compare(saved: &Registers, now: &Registers, parts: &[(u32, usize, usize)]) -> Vec<String> {
    let mut found = Vec::new();
    let mut same = |what: &str, same: bool| {
        if !same {
            found.push(what.to_owned());
        }
    };
    same("the general registers", saved.regs == now.regs);
    let system = |r: &Registers| {
        let s = &r.sregs;
        (
            [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr],
            [s.gdt, s.idt],
            [s.cr0, s.cr3, s.cr4, s.efer],
        )
    };
    same("the segments", system(saved).0 == system(now).0);
    same("the descriptor tables", system(saved).1 == system(now).1);
    same("the control registers", system(saved).2 == system(now).2);
    let vectors = |r: &Registers| cpu::plain_vectors(&r.xsave, parts);
    let (before, after) = (vectors(saved), vectors(now));
    let differs = before.iter().zip(&after).position(|(a, b)| a != b);
    let at = differs.map_or_else(String::new, |at| format!(" from byte {at} on"));
    same(&format!("the vectors{at}"), differs.is_none());
    same("model-specific registers", saved.msrs == now.msrs);
    same("XCR0", saved.xcr0 == now.xcr0);
    found
}

/// What the owner gave.
fn given(fd: Option<OwnedFd>) -> Result<Open, String> {
    fd.map(|fd| Open::Host(HostFile::pipe(fd)))
        .ok_or_else(|| "a descriptor is missing".into())
}

/// Opens again what a template had open.
fn reopen(kernel: &mut Kernel, open: &[(u64, SavedOpen, bool)]) -> nix::Result<()> {
    for (fd, saved, close) in open {
        let shared = match saved {
            SavedOpen::Same(other) => kernel.table.get(*other)?,
            SavedOpen::Null => share(Open::Null),
            SavedOpen::Zero => share(Open::Zero),
            SavedOpen::Random => share(Open::Random),
            SavedOpen::Directory(path) => share(directory(path.clone())),
            SavedOpen::File(path, at) => {
                let place = kernel.layers.walk(path, true)?;
                let file = kernel.layers.open_read(&place)?;
                // SAFETY: a descriptor of ours.
                let moved = unsafe { libc::lseek(file.fd.as_raw_fd(), *at as i64, libc::SEEK_SET) };
                nix::errno::Errno::result(moved)?;
                share(regular(file, false, path.clone()))
            }
        };
        kernel.table.replace(*fd, shared, *close)?;
    }
    Ok(())
}

fn kernel(surroundings: &Surroundings, template: &Template) -> Result<Kernel, String> {
    let again = |fd: &Option<OwnedFd>| match fd {
        Some(fd) => duplicate(fd.as_raw_fd()).map(Some),
        None => Ok(None),
    };
    let lower = again(&surroundings.lower).map_err(|why| why.to_string())?;
    let upper = again(&surroundings.upper).map_err(|why| why.to_string())?;
    let account = Account::new().map_err(|why| format!("shared memory: {why}"))?;
    let pid = nix::unistd::getpid();
    let upper = upper.map(|base| Upper {
        base,
        name: layer_name(&surroundings.secret, pid.as_raw()),
        most: 0,
        account: &account.upper,
        lock: Lock::new(surroundings.locks, pid.as_raw().into()),
        directory: None,
    });
    let state = &template.state;
    Ok(new_kernel(
        template.program(),
        &state.program_path,
        state.process.space.clone(),
        Layers::new(lower, upper),
        account,
        Box::new(|_, _| true),
    ))
}

/// The monotonic clock at `instant`, in nanoseconds.
fn nanoseconds(instant: Instant) -> u64 {
    let time = super::calls::time::now(libc::CLOCK_MONOTONIC as u64);
    let now = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
    now.saturating_sub(instant.elapsed().as_nanos() as u64)
}
