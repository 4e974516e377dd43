//! Signals of a guest process: those that it raises itself, those of its faults, and a broken pipe.
//!
//! They are delivered when a call returns, when a fault has stopped it, or between two of its own
//! instructions; never inside the shim.

use kvm_bindings::kvm_regs;
use nix::errno::Errno;

use super::super::memory::{Fault, GuestMemory};
use super::Answer;

const SIG_DFL: u64 = 0;
const SIG_IGN: u64 = 1;
/// `SA_RESTORER`: the return from a handler is the guest's own code, always on x86-64.
const SA_RESTORER: u64 = 0x0400_0000;
const SA_ONSTACK: u64 = 0x0800_0000;
const SA_RESTART: u64 = 0x1000_0000;
const SA_NODEFER: u64 = 0x4000_0000;
const SA_RESETHAND: u64 = 0x8000_0000;

/// Bytes below the stack pointer that a function may use without saying so.
const RED_ZONE: u64 = 128;
/// The return address, a `ucontext` and a `siginfo`.
const FRAME: usize = 8 + 304 + 128;

/// What a guest wants done about a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

impl Action {
    /// As the kernel's interface orders it.
    const fn words(&self) -> [u64; ACTION_WORDS] {
        [self.handler, self.flags, self.restorer, self.mask]
    }
}

/// Handlers, mask, and what is pending.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Signals {
    actions: Vec<(i32, Action)>,
    blocked: u64,
    raised: u64,
    /// The other stack: address, flags, size.
    stack: (u64, u64, u64),
    /// The mask that comes back after a `sigsuspend`.
    before_suspend: Option<u64>,
}

/// What comes of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// A handler runs.
    Handled,
    /// The process ends by it.
    Fatal(i32),
}

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Whether a signal does nothing by default.
pub const fn is_harmless(signal: i32) -> bool {
    matches!(
        signal,
        libc::SIGCHLD
            | libc::SIGURG
            | libc::SIGWINCH
            | libc::SIGCONT
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
    )
}

/// Signals that Linux knows.
pub const SIGNALS: usize = 64;
/// Words of what `rt_sigaction` gives and takes.
pub const ACTION_WORDS: usize = 4;

impl Signals {
    /// What is done about each signal, as `rt_sigaction` gives it.
    pub fn actions(&self) -> [u64; SIGNALS * ACTION_WORDS] {
        let mut words = [0; SIGNALS * ACTION_WORDS];
        for (signal, action) in &self.actions {
            let place = words
                .chunks_exact_mut(ACTION_WORDS)
                .nth(*signal as usize - 1);
            if let Some(place) = place {
                place.copy_from_slice(&action.words());
            }
        }
        words
    }

    /// Sets what is done about each.
    pub fn set_actions(&mut self, bytes: &[u8; SIGNALS * ACTION_WORDS * 8]) {
        self.actions.clear();
        for (signal, words) in (1..).zip(bytes.chunks_exact(ACTION_WORDS * 8)) {
            if words.iter().all(|byte| *byte == 0)
                || [libc::SIGKILL, libc::SIGSTOP].contains(&signal)
            {
                continue;
            }
            let word = |i: usize| {
                let bytes = words.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok());
                u64::from_le_bytes(bytes.unwrap_or_default())
            };
            let action = Action {
                handler: word(0),
                flags: word(1),
                restorer: word(2),
                mask: word(3),
            };
            self.actions.push((signal, action));
        }
    }

    fn action_of(&self, signal: i32) -> Action {
        let known = self.actions.iter().find(|(number, _)| *number == signal);
        known.map_or_else(Action::default, |(_, action)| *action)
    }

    fn set(&mut self, signal: i32, action: Action) {
        self.actions.retain(|(number, _)| *number != signal);
        if action != Action::default() {
            self.actions.push((signal, action));
        }
    }

    /// Makes a signal pending. 0 is none.
    pub fn raise(&mut self, signal: i32) {
        if (1..=64).contains(&signal) {
            self.raised |= bit(signal);
        }
    }

    /// Whether something is pending that is not blocked.
    pub const fn any(&self) -> bool {
        self.raised & !self.blocked != 0
    }

    /// Forgets handlers, not what is ignored: `execve`.
    pub fn forget_handlers(&mut self) {
        self.actions.retain(|(_, action)| action.handler == SIG_IGN);
        self.stack = (0, 0, 0);
    }

    /// Nothing is pending: a new process.
    pub fn forget_pending(&mut self) {
        self.raised = 0;
    }

    /// `rt_sigaction`
    pub fn action(&mut self, memory: &GuestMemory, signal: u64, new: u64, old: u64) -> Answer {
        let signal = i32::try_from(signal).map_err(|_| Errno::EINVAL)?;
        if !(1..=64).contains(&signal) {
            return Err(Errno::EINVAL);
        }
        let current = self.action_of(signal);
        if new != 0 {
            if [libc::SIGKILL, libc::SIGSTOP].contains(&signal) {
                return Err(Errno::EINVAL);
            }
            let word = |i: u64| memory.read_u64(new.wrapping_add(i * 8));
            let action = Action {
                handler: word(0)?,
                flags: word(1)?,
                restorer: word(2)?,
                mask: word(3)?,
            };
            self.set(signal, action);
        }
        if old != 0 {
            let bytes: Vec<u8> = current
                .words()
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            memory.write(old, &bytes)?;
        }
        Ok(0)
    }

    /// `rt_sigprocmask`
    pub fn mask(&mut self, memory: &GuestMemory, how: u64, new: u64, old: u64) -> Answer {
        let before = self.blocked;
        if new != 0 {
            let set = memory.read_u64(new)?;
            self.blocked = match i32::try_from(how).unwrap_or(-1) {
                libc::SIG_BLOCK => before | set,
                libc::SIG_UNBLOCK => before & !set,
                libc::SIG_SETMASK => set,
                _ => return Err(Errno::EINVAL),
            } & !(bit(libc::SIGKILL) | bit(libc::SIGSTOP));
        }
        if old != 0 {
            memory.write(old, &before.to_le_bytes())?;
        }
        Ok(0)
    }

    /// `sigaltstack`
    pub fn stack(&mut self, memory: &GuestMemory, new: u64, old: u64) -> Answer {
        let before = self.stack;
        if new != 0 {
            let word = |i: u64| memory.read_u64(new.wrapping_add(i * 8));
            let (address, flags, size) = (word(0)?, word(1)? & 0xffff_ffff, word(2)?);
            self.stack = if flags & 2 != 0 {
                (0, 0, 0)
            } else {
                (address, flags, size)
            };
        }
        if old != 0 {
            // SS_DISABLE where there is none.
            let flags = if before.2 == 0 { 2 } else { before.1 };
            let words = [before.0, flags, before.2];
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            memory.write(old, &bytes)?;
        }
        Ok(0)
    }

    /// `rt_sigpending`
    pub fn pending(&self, memory: &GuestMemory, into: u64) -> Answer {
        memory.write(into, &(self.raised & self.blocked).to_le_bytes())?;
        Ok(0)
    }

    /// Makes signals pending, one bit each.
    pub fn raise_all(&mut self, bits: u64) {
        self.raised |= bits;
    }

    /// Whether a call that a pending signal has interrupted answers EINTR: where a handler runs
    /// that did not ask for the call to go on.
    pub fn interrupts(&self) -> bool {
        let ready = self.raised & !self.blocked;
        (1..=64)
            .filter(|signal| ready & bit(*signal) != 0)
            .any(|signal| {
                let action = self.action_of(signal);
                match action.handler {
                    SIG_IGN => false,
                    SIG_DFL => !is_harmless(signal),
                    _ => action.flags & SA_RESTART == 0,
                }
            })
    }

    /// Forgets pending signals that do nothing.
    pub fn drop_ignored(&mut self) {
        for signal in 1..=64 {
            let handler = self.action_of(signal).handler;
            let ignored = handler == SIG_IGN || handler == SIG_DFL && is_harmless(signal);
            if ignored && self.blocked & bit(signal) == 0 {
                self.raised &= !bit(signal);
            }
        }
    }

    /// `rt_sigsuspend`: another mask until a signal was handled; gives the one before.
    pub fn suspend(&mut self, mask: u64) {
        if self.before_suspend.is_none() {
            self.before_suspend = Some(self.blocked);
            self.blocked = mask & !(bit(libc::SIGKILL) | bit(libc::SIGSTOP));
        }
    }

    /// Takes the next signal that is pending, and does what is to be done. `regs` are those with
    /// which the guest would go on.
    pub fn deliver(&mut self, memory: &GuestMemory, regs: &mut kvm_regs) -> Option<Delivery> {
        loop {
            let ready = self.raised & !self.blocked;
            if ready == 0 {
                return None;
            }
            let signal = ready.trailing_zeros() as i32 + 1;
            self.raised &= !bit(signal);
            let action = self.action_of(signal);
            match action.handler {
                SIG_IGN => {}
                SIG_DFL if is_harmless(signal) => {}
                SIG_DFL => return Some(Delivery::Fatal(signal)),
                _ => {
                    return Some(match self.enter(memory, regs, signal, action) {
                        Ok(()) => Delivery::Handled,
                        Err(Fault) => Delivery::Fatal(libc::SIGSEGV),
                    });
                }
            }
        }
    }

    fn enter(
        &mut self,
        memory: &GuestMemory,
        regs: &mut kvm_regs,
        signal: i32,
        action: Action,
    ) -> Result<(), Fault> {
        if action.flags & SA_RESTORER == 0 {
            return Err(Fault);
        }
        let (base, _, size) = self.stack;
        let on_it = size > 0 && (base..base.wrapping_add(size)).contains(&regs.rsp);
        let top = if action.flags & SA_ONSTACK != 0 && size > 0 && !on_it {
            base.wrapping_add(size)
        } else {
            regs.rsp.wrapping_sub(RED_ZONE)
        };
        // As after a call: sixteen bytes and a return address.
        let at = (top.wrapping_sub(FRAME as u64) & !15).wrapping_sub(8);
        let mut words: Vec<u64> = Vec::with_capacity(FRAME / 8);
        words.push(action.restorer);
        // ucontext: flags, link, stack; then the registers.
        words.extend([0, 0, self.stack.0, self.stack.1, self.stack.2]);
        words.extend(registers(regs));
        // err, trapno, oldmask, cr2, fpstate, reserved.
        words.extend([0; 13]);
        words.push(self.before_suspend.take().unwrap_or(self.blocked));
        let info = 8 + 304;
        words.resize(info / 8, 0);
        // siginfo: number, errno, code (SI_KERNEL or of the process itself).
        words.push(signal as u32 as u64);
        words.push(0x80);
        words.resize(FRAME / 8, 0);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write(at, &bytes)?;

        self.blocked |= action.mask;
        if action.flags & SA_NODEFER == 0 {
            self.blocked |= bit(signal);
        }
        if action.flags & SA_RESETHAND != 0 {
            self.set(signal, Action::default());
        }
        regs.rsp = at;
        regs.rdi = signal as u64;
        regs.rsi = at + info as u64;
        regs.rdx = at + 8;
        regs.rax = 0;
        regs.rip = action.handler;
        regs.rflags = 2;
        Ok(())
    }

    /// `rt_sigreturn`: goes on where the handler was entered.
    ///
    /// # Errors
    /// Where the frame is not the guest's: it has destroyed its own stack.
    pub fn leave(&mut self, memory: &GuestMemory, regs: &mut kvm_regs) -> Result<(), Fault> {
        // The handler's return took the restorer's address off the stack.
        let context = regs.rsp;
        let mut bytes = [0; 304];
        memory.read(context, &mut bytes)?;
        let word = |i: usize| {
            let at = i * 8;
            let bytes = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        // Flags, link and stack before them.
        let saved: Vec<u64> = (5..5 + 18).map(word).collect();
        set_registers(regs, &saved);
        self.blocked = word(5 + 19 + 13) & !(bit(libc::SIGKILL) | bit(libc::SIGSTOP));
        Ok(())
    }
}

/// In the order of `struct sigcontext`; the last is the selectors.
fn registers(regs: &kvm_regs) -> [u64; 19] {
    [
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rdi,
        regs.rsi,
        regs.rbp,
        regs.rbx,
        regs.rdx,
        regs.rax,
        regs.rcx,
        regs.rsp,
        regs.rip,
        regs.rflags,
        // cs, gs, fs, ss
        0x002b_0000_0000_0033,
    ]
}

/// Flags that user mode may set: carry, parity, auxiliary, zero, sign, direction, overflow,
/// alignment, identification.
const USER_FLAGS: u64 = 0x24_0cd5;

fn set_registers(regs: &mut kvm_regs, saved: &[u64]) {
    let &[
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rdi,
        rsi,
        rbp,
        rbx,
        rdx,
        rax,
        rcx,
        rsp,
        rip,
        flags,
    ] = saved
    else {
        return;
    };
    (regs.r8, regs.r9, regs.r10, regs.r11) = (r8, r9, r10, r11);
    (regs.r12, regs.r13, regs.r14, regs.r15) = (r12, r13, r14, r15);
    (regs.rdi, regs.rsi, regs.rbp, regs.rbx) = (rdi, rsi, rbp, rbx);
    (regs.rdx, regs.rax, regs.rcx, regs.rsp) = (rdx, rax, rcx, rsp);
    regs.rip = rip;
    regs.rflags = flags & USER_FLAGS | 2;
}
