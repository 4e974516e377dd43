//! Buffers inside the guest by which the shim reads and writes without leaving the machine.
//!
//! What the guest says about them is checked: a guest that lies about how much it read or wrote
//! reads or writes something else of its own.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use super::calls::table::{Open, Shared};
use super::calls::{Call, Kernel};
use super::layout::system;
use super::memory::{GuestMemory, system_address};
use super::shim::data;

/// Windows in use, and whether output is kept inside.
#[derive(Debug, Default)]
pub struct Windows {
    inputs: [Option<Input>; system::INPUTS as usize],
    /// The one that is taken next when all are in use.
    next: usize,
}

/// A part of a file that lies inside.
#[derive(Debug)]
struct Input {
    fd: u64,
    open: Shared,
    /// Bytes that the guest had not read when the host looked last.
    left: u64,
    /// Whether the entry in the shim's page still stands.
    stands: bool,
}

/// Bytes of standard output and error each.
const KEPT: [u64; 2] = [system::OUTPUT_LEN * 3 / 4, system::OUTPUT_LEN / 4];

impl Windows {
    /// Tells the shim which output it may keep, and forgets windows.
    pub fn publish(&mut self, memory: &GuestMemory, kernel: &Kernel) {
        for i in 0..4 {
            memory.set_data(data::WINDOW_OF + i * 8, 0);
        }
        self.forget();
        self.publish_output(memory, kernel);
    }

    fn publish_output(&self, memory: &GuestMemory, kernel: &Kernel) {
        for (i, fd) in [1u64, 2].into_iter().enumerate() {
            let open = kernel.table.get(fd).ok();
            let stream = open.and_then(|open| match &*open.borrow() {
                Open::Captured(stream) => Some(*stream),
                _ => None,
            });
            // Two descriptors on one stream would lose their order.
            let kept = stream == Some(fd as u8);
            let at = data::OUTPUTS + i as u64 * data::OUTPUT_SIZE;
            memory.set_data(at, system_address(system::OUTPUT + i as u64 * KEPT[0]));
            memory.set_data(at + 8, 0);
            memory.set_data(at + 16, if kept { KEPT[i] } else { 0 });
        }
    }

    /// Takes the output that was kept inside.
    pub fn take_output(&self, memory: &GuestMemory, kernel: &mut Kernel) {
        for (i, most) in KEPT.into_iter().enumerate() {
            let at = data::OUTPUTS + i as u64 * data::OUTPUT_SIZE;
            let len = memory.data(at + 8).min(most);
            if len == 0 {
                continue;
            }
            memory.set_data(at + 8, 0);
            let mut bytes = vec![0; len as usize];
            memory.read_offset(system::OUTPUT + i as u64 * KEPT[0], &mut bytes);
            kernel.outputs.take(i as u8 + 1, &bytes);
        }
    }

    /// Moves each file on by what the guest has read of its window.
    pub fn settle(&mut self, memory: &GuestMemory) {
        for (i, input) in self.inputs.iter_mut().enumerate() {
            let Some(input) = input else { continue };
            let entry = data::WINDOWS + i as u64 * data::WINDOW_SIZE;
            let left = memory.data(entry + 8).min(input.left);
            let read = input.left - left;
            if read == 0 || !input.stands {
                continue;
            }
            input.left = left;
            match &mut *input.open.borrow_mut() {
                Open::Host(file) => {
                    // SAFETY: a descriptor of ours.
                    let _at = unsafe {
                        libc::lseek(file.fd.as_raw_fd(), read as libc::off_t, libc::SEEK_CUR)
                    };
                }
                Open::Bytes { at, bytes } => *at = (*at + read as usize).min(bytes.len()),
                _ => {}
            }
        }
    }

    /// Before a call is served: a call that changes files or descriptors ends windows.
    pub fn before(&mut self, call: &Call) {
        let number = i64::try_from(call.number).unwrap_or(-1);
        let changes_all = matches!(
            number,
            libc::SYS_write
                | libc::SYS_writev
                | libc::SYS_pwrite64
                | libc::SYS_sendfile
                | libc::SYS_ftruncate
                | libc::SYS_truncate
                | libc::SYS_open
                | libc::SYS_openat
                | libc::SYS_dup
                | libc::SYS_dup2
                | libc::SYS_dup3
                | libc::SYS_fcntl
        );
        // A write to what is not a regular file changes none; that is most of them.
        let writes = [libc::SYS_write, libc::SYS_writev, libc::SYS_sendfile].contains(&number);
        let harmless =
            writes && call.args[0] <= 2 || matches!(number, libc::SYS_open | libc::SYS_openat);
        let one = matches!(number, libc::SYS_lseek | libc::SYS_close | libc::SYS_readv);
        for input in self.inputs.iter_mut().flatten() {
            let sent = number == libc::SYS_sendfile && input.fd == call.args[1];
            if (changes_all && !harmless) || (one && input.fd == call.args[0]) || sent {
                input.stands = false;
            }
        }
    }

    /// After a call was served: new windows, and what became of the old ones.
    pub fn after(&mut self, call: &Call, value: i64, memory: &GuestMemory, kernel: &mut Kernel) {
        for (i, slot) in self.inputs.iter_mut().enumerate() {
            if slot.as_ref().is_some_and(|input| !input.stands) {
                withdraw_one(memory, i, slot);
            }
        }
        self.publish_output(memory, kernel);
        if kernel.relatives || value < 0 {
            return;
        }
        match i64::try_from(call.number).unwrap_or(-1) {
            libc::SYS_read => self.fill(call.args[0], memory, kernel),
            libc::SYS_open | libc::SYS_openat => self.fill(value as u64, memory, kernel),
            _ => {}
        }
    }

    /// Lays what comes next of `fd` into a window.
    fn fill(&mut self, fd: u64, memory: &GuestMemory, kernel: &Kernel) {
        if fd >= data::WINDOWED {
            return;
        }
        // A window that is used up holds the file as well: it goes before holders are counted.
        let known = self
            .inputs
            .iter()
            .position(|input| input.as_ref().is_some_and(|input| input.fd == fd));
        let mut most = system::FIRST_INPUT_LEN;
        if let Some(i) = known
            && let Some(slot) = self.inputs.get_mut(i)
        {
            // It is read from one end to the other.
            if slot.as_ref().is_some_and(|input| input.left == 0) {
                most = system::INPUT_LEN;
            }
            withdraw_one(memory, i, slot);
        }
        let Ok(open) = kernel.table.get(fd) else {
            return;
        };
        if !can_have_window(&open) {
            return;
        }
        let free = self.inputs.iter().position(Option::is_none);
        let i = known.or(free).unwrap_or_else(|| {
            self.next = (self.next + 1) % self.inputs.len();
            self.next
        });
        if let Some(slot) = self.inputs.get_mut(i) {
            withdraw_one(memory, i, slot);
        }
        let place = system::INPUT + i as u64 * system::INPUT_LEN;
        let Some((len, ends)) = lay(&open, memory, place, most) else {
            return;
        };
        let entry = data::WINDOWS + i as u64 * data::WINDOW_SIZE;
        memory.set_data(entry, system_address(place));
        memory.set_data(entry + 8, len);
        memory.set_data(entry + 16, u64::from(ends));
        let number = i as u8 + 1;
        memory.write_offset(system::DATA + data::WINDOW_OF + fd, &[number]);
        self.inputs[i] = Some(Input {
            fd,
            open,
            left: len,
            stands: true,
        });
    }

    /// Forgets all windows: their files are not moved on any more.
    pub fn forget(&mut self) {
        self.inputs = Default::default();
    }

    /// Tells the shim that there are no windows.
    pub fn withdraw(&self, memory: &GuestMemory) {
        for i in 0..4 {
            memory.set_data(data::WINDOW_OF + i * 8, 0);
        }
    }

    /// Lays a window on standard input that was given as bytes.
    pub fn lay_input(&mut self, memory: &GuestMemory, kernel: &Kernel) {
        self.fill(0, memory, kernel);
    }
}

fn withdraw_one(memory: &GuestMemory, i: usize, slot: &mut Option<Input>) {
    if let Some(input) = slot.take() {
        memory.write_offset(system::DATA + data::WINDOW_OF + input.fd, &[0]);
        memory.set_data(data::WINDOWS + i as u64 * data::WINDOW_SIZE + 8, 0);
    }
}

/// Only what one descriptor has, and what the guest alone moves on.
fn can_have_window(open: &Rc<RefCell<Open>>) -> bool {
    // The table and the caller have one each.
    if Rc::strong_count(open) > 2 {
        return false;
    }
    match &*open.borrow() {
        Open::Host(file) => file.regular && !file.upper,
        Open::Bytes { .. } => true,
        _ => false,
    }
}

/// Copies what comes next into a window; gives its length and whether the file ends behind it.
fn lay(open: &Shared, memory: &GuestMemory, place: u64, most: u64) -> Option<(u64, bool)> {
    match &*open.borrow() {
        Open::Host(file) => {
            // SAFETY: a descriptor of ours.
            let at = unsafe { libc::lseek(file.fd.as_raw_fd(), 0, libc::SEEK_CUR) };
            let into = memory.offset(place, most)?;
            // SAFETY: `offset` has checked so many bytes.
            let n = unsafe {
                libc::pread(
                    file.fd.as_raw_fd(),
                    into.as_ptr().cast(),
                    most as usize,
                    at.max(0),
                )
            };
            let n = u64::try_from(n).ok()?;
            Some((n, n < most))
        }
        Open::Bytes { bytes, at } => {
            let rest = bytes.get(*at..)?;
            let part = &rest[..rest.len().min(most as usize)];
            memory.write_offset(place, part);
            Some((part.len() as u64, part.len() == rest.len()))
        }
        _ => None,
    }
}
