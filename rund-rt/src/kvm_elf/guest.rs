//! A guest process: its machine, its memory, and what Linux would know of it; and the loop in which
//! it runs.

use std::rc::Rc;

use carlsbad_types::ByteSize;
use kvm_bindings::kvm_regs;
use nix::errno::Errno;

use crate::backend::Status;

use super::calls::children::Report;
use super::calls::signal::Delivery;
use super::calls::{Call, Execute, Kernel, Outcome, Program};
use super::clock;
use super::cpu;
use super::elf::{LoadPlan, Segment};
use super::interrupt;
use super::kept;
use super::layout::{Layout, PAGE, SYSTEM_START, page_up, system};
use super::machine::{Host, Machine, Refusal, Stop};
use super::memory::{Extent, GuestMemory};
use super::page_table;
use super::shim::{self, Return};
use super::stack::{self, Beginning};
use super::window::Windows;

/// A program, and where it goes.
#[derive(Debug, Clone)]
pub struct Image {
    /// How it is loaded.
    pub plan: LoadPlan,
    /// Where everything is.
    pub layout: Layout,
}

impl Image {
    /// Lays a program out in a guest with `memory`.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn new(plan: LoadPlan, memory: ByteSize) -> Result<Self, String> {
        let layout = Layout::new(&plan, memory)?;
        Ok(Self { plan, layout })
    }

    /// Writes program and tables into new memory; gives the root of the tables too.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn load(
        &self,
        contents: &Contents<'_>,
        way_back: Return,
    ) -> Result<(GuestMemory, u64), String> {
        let mut memory =
            GuestMemory::new(&self.layout).map_err(|why| format!("no memory: {why}"))?;
        self.fill(&mut memory, contents, way_back, system::TABLES)?;
        Ok((memory, system::TABLES))
    }

    /// Writes program and tables, these from `root` on, into memory of zeros; gives their end.
    ///
    /// # Errors
    /// Where there is no room.
    fn fill(
        &self,
        memory: &mut GuestMemory,
        contents: &Contents<'_>,
        way_back: Return,
        root: u64,
    ) -> Result<u64, String> {
        let end = page_table::write(memory, &self.layout, root)?;
        cpu::write_tables(memory, way_back);
        memory.write_offset(system::CODE, &shim::code(way_back));
        for segment in &self.plan.segments {
            let Some(region) = self
                .layout
                .regions
                .iter()
                .find(|r| r.address <= segment.address && segment.address < r.end())
            else {
                continue;
            };
            let at = region.offset + (segment.address - region.address);
            match contents {
                Contents::Bytes(bytes) => {
                    let from = segment.file_offset as usize;
                    let part = bytes
                        .get(from..from + segment.file_len as usize)
                        .ok_or("the program ends early")?;
                    memory.write_offset(at, part);
                }
                Contents::Part(program, Way::Copy) => {
                    let part = program.bytes(segment.file_offset, segment.file_len);
                    memory.write_offset(at, &part.map_err(|why| why.to_string())?);
                }
                Contents::Part(program, Way::Map) => {
                    lay_segment(memory, program, segment, at)
                        .map_err(|why| format!("the program cannot be mapped: {why}"))?;
                }
            }
        }
        Ok(end)
    }
}

/// Where a program's bytes are.
#[derive(Debug)]
pub enum Contents<'a> {
    /// Here.
    Bytes(&'a [u8]),
    /// In a file.
    Part(&'a Program, Way),
}

/// How bytes of a file get into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// All are read.
    Copy,
    /// Their pages are the page cache's until they are written to.
    Map,
}

/// Maps the pages of a segment whose first byte goes to `at`.
fn lay_segment(
    memory: &GuestMemory,
    program: &Program,
    segment: &Segment,
    at: u64,
) -> nix::Result<()> {
    if segment.file_len == 0 {
        return Ok(());
    }
    // The plan has seen to it that both lie as far behind the beginning of a page.
    let before = at % PAGE;
    let end = before + segment.file_len;
    memory.lay(
        &*program.fd,
        &[Extent {
            offset: at - before,
            file_offset: program.offset + segment.file_offset - before,
            len: page_up(end),
        }],
    )?;
    // What follows in the last page is another part of the file, where zeros are asked for.
    if segment.len > segment.file_len && !end.is_multiple_of(PAGE) {
        memory.clear_offset(at - before + end, PAGE - end % PAGE, false)?;
    }
    Ok(())
}

/// A guest process.
#[derive(Debug)]
pub struct Guest {
    // In this order: the machine goes before its memory.
    pub machine: Machine,
    pub memory: GuestMemory,
    pub kernel: Kernel,
    pub image: Image,
    pub root: u64,
    /// Where no page table has been, 0 where that is not known yet.
    pub unused_tables: u64,
    /// Whether there are other tables where the template's were.
    pub tables_overwritten: bool,
    pub host: Rc<Host>,
    pub way_back: Return,
    pub windows: Windows,
    /// Calls that left the machine.
    pub exits: u64,
    /// Whether memory and program are still those of the template.
    pub is_template: bool,
    /// Whether this is a process that the guest made by `fork`.
    pub is_child: bool,
    /// Where such a process says how it ends.
    pub report: Option<Report>,
}

/// Why a guest does not run any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It has ended.
    Status(Status),
    /// The template is to be saved.
    Snapshot,
    /// The machine is of no use any more.
    Broken(String),
}

impl Guest {
    /// Runs it to its end.
    pub fn run(&mut self) -> End {
        interrupt::watch(self.machine.immediate_exit());
        let end = self.run_watched();
        interrupt::forget();
        self.collect();
        end
    }

    fn run_watched(&mut self) -> End {
        loop {
            let end = match self.machine.run() {
                Stop::Call => self.serve(),
                Stop::Exception(vector) => self.fault(vector),
                Stop::Port => {
                    // On Linux a program without rights to ports gets a general protection.
                    let regs = *self.machine.regs();
                    self.fatal(regs, libc::SIGSEGV)
                }
                Stop::Interrupted if interrupt::is_over() => Some(End::Status(interrupt::end())),
                Stop::Interrupted => self.interrupted(),
                Stop::Broken(why) => Some(End::Broken(why)),
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Takes what the shim has kept.
    fn collect(&mut self) {
        if self.way_back == Return::Jump {
            kept::collect(&self.memory, &mut self.kernel);
            self.windows.take_output(&self.memory, &mut self.kernel);
            self.windows.settle(&self.memory);
        }
    }

    /// Serves the call for which the machine was left.
    fn serve(&mut self) -> Option<End> {
        self.exits += 1;
        self.collect();
        let regs = *self.machine.regs();
        let call = Call {
            number: regs.rax,
            args: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
        };
        self.windows.before(&call);
        if call.number == libc::SYS_arch_prctl as u64 {
            let answer = self.segment_base(call.args[0], call.args[1]);
            self.machine.regs().rax =
                answer.map_or_else(|why| -i64::from(why as i32), |()| 0) as u64;
            return None;
        }
        let outcome = loop {
            match self.kernel.call(&self.memory, call) {
                Outcome::Interrupted if interrupt::is_over() => {
                    return Some(End::Status(interrupt::end()));
                }
                Outcome::Interrupted => {
                    self.take_signals();
                    if self.kernel.signals.interrupts() {
                        break Outcome::Interrupted;
                    }
                    self.kernel.signals.drop_ignored();
                }
                other => break other,
            }
        };
        let value = match outcome {
            Outcome::Value(value) => value,
            Outcome::End(status) => return Some(End::Status(status)),
            Outcome::Snapshot => return Some(End::Snapshot),
            Outcome::SignalReturn => {
                let mut regs = regs;
                if self.kernel.signals.leave(&self.memory, &mut regs).is_err() {
                    return Some(End::Status(Status::Signal(libc::SIGSEGV)));
                }
                return self.go_on(regs, false);
            }
            Outcome::Execute(execute) => {
                return match self.execute(&execute) {
                    // Signals may have come meanwhile.
                    Ok(()) => self.interrupted(),
                    // The old program is gone, as on Linux past the point of no return.
                    Err(why) => {
                        tracing::debug!(why, "execve");
                        Some(End::Status(Status::Signal(libc::SIGKILL)))
                    }
                };
            }
            Outcome::Fork {
                stack,
                child_id_at,
                parent_id_at,
            } => match self.fork(stack, child_id_at) {
                Ok(0) => 0,
                Ok(child) => {
                    if parent_id_at != 0 {
                        let _not_the_guests = self
                            .memory
                            .write(parent_id_at, &(child as i32).to_le_bytes());
                    }
                    child
                }
                Err(why) => return Some(End::Broken(why)),
            },
            Outcome::Interrupted => -i64::from(libc::EINTR),
        };
        self.machine.regs().rax = value as u64;
        if self.way_back == Return::Jump {
            kept::after(&self.memory, &self.kernel, call.number);
            self.windows
                .after(&call, value, &self.memory, &mut self.kernel);
        }
        self.take_signals();
        if self.kernel.signals.any() {
            let mut regs = *self.machine.regs();
            // The call has returned.
            (regs.rip, regs.rflags) = (regs.rcx, regs.r11);
            return self.deliver(regs, false);
        }
        None
    }

    /// `arch_prctl`: the bases of the segments fs and gs, of which fs holds a thread's data.
    fn segment_base(&mut self, what: u64, address: u64) -> Result<(), Errno> {
        // `arch/x86/include/uapi/asm/prctl.h`
        const SET_GS: u64 = 0x1001;
        const SET_FS: u64 = 0x1002;
        const GET_FS: u64 = 0x1003;
        const GET_GS: u64 = 0x1004;
        let refused = |why: Refusal| why.why;
        let mut sregs = self.machine.sregs().map_err(refused)?;
        match what {
            SET_FS | SET_GS if address >= SYSTEM_START => return Err(Errno::EPERM),
            SET_FS => sregs.fs.base = address,
            SET_GS => sregs.gs.base = address,
            GET_FS => return Ok(self.memory.write(address, &sregs.fs.base.to_le_bytes())?),
            GET_GS => return Ok(self.memory.write(address, &sregs.gs.base.to_le_bytes())?),
            _ => return Err(Errno::EINVAL),
        }
        self.machine.set_sregs(&sregs).map_err(refused)
    }

    /// Takes the signals that came.
    fn take_signals(&mut self) {
        const CHILD: u64 = 1 << (libc::SIGCHLD - 1);
        let mut came = interrupt::take();
        if came & CHILD != 0 && !self.kernel.children.signal_came() {
            came &= !CHILD;
        }
        self.kernel.signals.raise_all(came);
    }

    /// Signals came while the guest ran.
    fn interrupted(&mut self) -> Option<End> {
        self.take_signals();
        let regs = *self.machine.regs();
        if !self.kernel.signals.any() {
            return None;
        }
        if shim::is_inside(regs.rip) {
            // A call is being answered: the signal is delivered when the next one returns.
            return None;
        }
        if self.way_back == Return::Jump {
            kept::collect(&self.memory, &mut self.kernel);
        }
        self.deliver(regs, false)
    }

    /// Delivers a signal to a guest that would go on with `regs`.
    fn deliver(&mut self, regs: kvm_regs, from_ring0: bool) -> Option<End> {
        let mut regs = regs;
        match self.kernel.signals.deliver(&self.memory, &mut regs) {
            Some(Delivery::Fatal(signal)) => Some(End::Status(Status::Signal(signal))),
            Some(Delivery::Handled) => self.go_on_in_handler(regs, from_ring0),
            None => None,
        }
    }

    fn go_on_in_handler(&mut self, regs: kvm_regs, from_ring0: bool) -> Option<End> {
        if self.way_back == Return::Jump {
            // One that runs only once is not in force any more.
            kept::publish_actions(&self.memory, &self.kernel);
        }
        self.go_on(regs, from_ring0)
    }

    /// Lets the guest go on with `regs`, at its own privilege.
    fn go_on(&mut self, regs: kvm_regs, from_ring0: bool) -> Option<End> {
        if (from_ring0 || self.way_back == Return::Sysret)
            && let Err(why) = self.machine.to_user_mode()
        {
            return Some(End::Broken(why.to_string()));
        }
        *self.machine.regs() = regs;
        None
    }

    /// The guest raised an exception: its own fault, or the shim's on its behalf.
    fn fault(&mut self, vector: u8) -> Option<End> {
        /// Exceptions that push an error code (Intel SDM, volume 3A, 6.3.1).
        const WITH_CODE: [u8; 9] = [8, 10, 11, 12, 13, 14, 17, 21, 29];
        let mut regs = *self.machine.regs();
        let code = if WITH_CODE.contains(&vector) { 8 } else { 0 };
        let frame = regs.rsp.wrapping_sub(SYSTEM_START).wrapping_add(code);
        let mut bytes = [0; 40];
        self.memory.read_offset(frame, &mut bytes);
        let word = |i: usize| {
            let bytes = bytes.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        let (rip, flags, rsp) = (word(0), word(2), word(3));
        regs.rsp = rsp;
        if shim::is_inside(rip) && self.way_back == Return::Jump {
            // What the guest gave a handler was not its own: the call is served here instead, and
            // answers EFAULT.
            let saved = |i: u64| self.memory.data(shim::data::SAVED + i * 8);
            (regs.rcx, regs.rdi, regs.rsi) = (saved(0), saved(1), saved(2));
            (regs.rdx, regs.rax) = (saved(3), saved(4));
            regs.rip = shim::exit_address() + 2;
            regs.rflags = flags & 0xcd5 | 2;
            if let Some(end) = self.go_on(regs, true) {
                return Some(end);
            }
            return self.serve();
        }
        let signal = match vector {
            0 | 16 | 19 => libc::SIGFPE,
            1 | 3 => libc::SIGTRAP,
            6 => libc::SIGILL,
            17 => libc::SIGBUS,
            _ => libc::SIGSEGV,
        };
        (regs.rip, regs.rflags) = (rip, flags);
        self.fatal(regs, signal)
    }

    /// A signal for what the guest did at `regs`.
    fn fatal(&mut self, mut regs: kvm_regs, signal: i32) -> Option<End> {
        if self.way_back == Return::Jump {
            kept::collect(&self.memory, &mut self.kernel);
        }
        self.kernel.signals.raise(signal);
        match self.kernel.signals.deliver(&self.memory, &mut regs) {
            Some(Delivery::Handled) => self.go_on_in_handler(regs, true),
            // One that is ignored or blocked ends it all the same, as on Linux.
            Some(Delivery::Fatal(_)) | None => Some(End::Status(Status::Signal(signal))),
        }
    }

    /// Becomes another program.
    fn execute(&mut self, execute: &Execute) -> Result<(), String> {
        let size = ByteSize::new(self.image.layout.memory);
        // What is saved as a template is what lies in memory, which mapped pages that nobody has
        // touched do not.
        let way = if execute.program.changes || self.kernel.snapshot.is_some() {
            Way::Copy
        } else {
            Way::Map
        };
        let image = Image::new(execute.plan.clone(), size)?;
        if self.way_back == Return::Sysret {
            // The call's own instruction is not the new program's.
            self.machine.complete();
        }
        self.windows.forget();
        let contents = Contents::Part(&execute.program, way);
        let behind = self.unused_tables();
        if self.exchange(&image, &contents, behind).is_err() {
            // There is no room behind those of the programs before.
            self.tables_overwritten = true;
            self.machine.take_memory().map_err(|why| why.to_string())?;
            let exchanged = self.exchange(&image, &contents, system::TABLES);
            // Whatever became of it: a reset takes it away again.
            self.machine
                .give_memory(&self.memory)
                .map_err(|why| why.to_string())?;
            exchanged?;
        }
        self.machine
            .begin_again(self.root)
            .map_err(|why| why.to_string())?;
        self.image = image;
        self.kernel.become_program(execute);
        self.kernel.space = super::calls::space::Space::new(&self.image.layout);
        self.begin(&execute.args, &execute.env, &execute.path)
            .map_err(|why| why.to_string())
    }

    /// Where no page table has been since the machine has its memory. KVM keeps what it has made of
    /// a table for as long as the guest does not write to it, and this side's writes it does not
    /// see; of all other pages it lets go when others are mapped in their place.
    fn unused_tables(&mut self) -> u64 {
        if self.unused_tables == 0 {
            self.unused_tables = page_table::end(&self.memory, self.root);
        }
        self.unused_tables
    }

    /// Puts another program into the memory, with its tables from `root` on.
    fn exchange(
        &mut self,
        image: &Image,
        contents: &Contents<'_>,
        root: u64,
    ) -> Result<(), String> {
        // From here on, even where it fails.
        self.is_template = false;
        self.memory
            .renew(&image.layout)
            .map_err(|why| format!("no memory: {why}"))?;
        self.unused_tables = image.fill(&mut self.memory, contents, self.way_back, root)?;
        self.root = root;
        Ok(())
    }

    /// Sets the machine to the program's first instruction.
    ///
    /// # Errors
    /// Where arguments and environment are too long.
    pub fn begin(&mut self, args: &[Vec<u8>], env: &[Vec<u8>], path: &[u8]) -> Result<(), Refusal> {
        let mut random = [0; 16];
        fill_random(&mut random);
        let beginning = Beginning {
            args,
            env,
            path,
            random,
            ids: (self.kernel.identity.uid, self.kernel.identity.gid),
            hwcap: u64::from(self.host.features()),
        };
        let top = self.image.layout.stack.end();
        let (pointer, _) = stack::write(&self.memory, &self.image.plan, top, &beginning).map_err(
            |super::memory::Fault| Refusal {
                what: "hold so many arguments",
                why: Errno::E2BIG,
            },
        )?;
        self.kernel.space.publish(&self.memory);
        self.publish();
        *self.machine.regs() = kvm_regs {
            rip: self.image.plan.entry,
            rsp: pointer,
            rflags: 2,
            ..Default::default()
        };
        Ok(())
    }

    /// Tells the shim who the guest is, what time it is, and what it may keep.
    pub fn publish(&mut self) {
        let ids = &self.kernel.identity;
        let values = [
            u64::from(ids.pid.unsigned_abs()),
            u64::from(ids.ppid.unsigned_abs()),
            u64::from(ids.uid),
            u64::from(ids.gid),
        ];
        for (i, value) in (0..).zip(values) {
            self.memory.set_data(shim::data::IDS + i * 8, value);
        }
        self.memory.set_data(shim::data::SERVED, 0);
        if self.way_back == Return::Jump {
            // While a template is built every draw comes to the host, to be counted.
            let counts = self.kernel.snapshot.is_some();
            let khz = self.host.tsc_khz(&self.machine);
            clock::publish(&self.memory, khz.filter(|_| !counts));
            kept::publish(&self.memory, &self.kernel, !counts);
            self.windows.publish(&self.memory, &self.kernel);
        }
    }

    /// Calls that were served inside the machine.
    pub fn served(&self) -> u64 {
        self.memory.data(shim::data::SERVED)
    }
}

/// Entropy of the host's.
pub fn fill_random(into: &mut [u8]) {
    // SAFETY: a buffer with its length.
    let _short_never = unsafe { libc::getrandom(into.as_mut_ptr().cast(), into.len(), 0) };
}
