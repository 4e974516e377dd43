//! Far memory as a pager reaches it: a range of which a part is here, in pages, and whose other
//! pages are fetched when they are touched. What systems that swap over a network do.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;

/// Bytes of a page.
pub const PAGE: usize = 4096;

// From linux/userfaultfd.h: _IOWR(0xaa, number, size).
const API: libc::c_ulong = iowr(0x3f, 24);
const REGISTER: libc::c_ulong = iowr(0x00, 32);
const COPY: libc::c_ulong = iowr(0x03, 40);
const API_VERSION: u64 = 0xaa;
const REGISTER_MISSING: u64 = 1;
const EVENT_PAGE_FAULT: u8 = 0x12;

const fn iowr(number: u64, size: u64) -> libc::c_ulong {
    3 << 30 | size << 16 | 0xaa << 8 | number
}

/// A range of memory that is fetched page by page, and of which at most some pages are here.
/// Dropping it ends its thread.
#[derive(Debug)]
pub struct PageSwap {
    base: usize,
    length: usize,
    stop: Option<File>,
    pager: Option<JoinHandle<()>>,
}

impl PageSwap {
    /// Whether this process may handle page faults.
    ///
    /// # Errors
    /// Where it may not.
    pub fn probe() -> io::Result<()> {
        open().map(drop)
    }

    /// A range of `length` bytes with at most `resident` pages here, the oldest of which goes when
    /// another comes. `fetch` fills a page from far memory; it runs in the pager's thread. Pages are
    /// only read, so that none has to be written back.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn new(
        length: usize,
        resident: usize,
        mut fetch: impl FnMut(usize, &mut [u8]) + Send + 'static,
    ) -> io::Result<Self> {
        let length = length.next_multiple_of(PAGE);
        let fd = open()?;
        // SAFETY: a new private mapping, wherever the kernel likes.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = base as usize;
        let (ended, stop) = pipe()?;
        let mut swap = Self {
            base,
            length,
            stop: Some(stop),
            pager: None,
        };
        // SAFETY: the mapping is this function's own; huge pages would defeat the cache's size.
        unsafe { libc::madvise(base as *mut _, length, libc::MADV_NOHUGEPAGE) };
        let mut register = [base as u64, length as u64, REGISTER_MISSING, 0];
        control(&fd, REGISTER, &mut register)?;
        // It ends when `stop` is dropped, and is joined there.
        swap.pager = Some(std::thread::spawn(move || {
            let mut here = VecDeque::with_capacity(resident + 1);
            let mut page = vec![0u8; PAGE];
            while let Some(address) = next_fault(&fd, &ended) {
                let at = address as usize / PAGE * PAGE;
                fetch((at - base) / PAGE, &mut page);
                if here.len() >= resident.max(1)
                    && let Some(oldest) = here.pop_front()
                {
                    // SAFETY: a page of the mapping, which lives until this thread is joined.
                    unsafe { libc::madvise(oldest as *mut _, PAGE, libc::MADV_DONTNEED) };
                }
                let mut copy = [at as u64, page.as_ptr() as u64, PAGE as u64, 0, 0];
                // Where the page came meanwhile, whoever waits for it goes on all the same.
                let _there = control(&fd, COPY, &mut copy);
                here.push_back(at);
            }
        }));
        Ok(swap)
    }

    /// The first byte. Every byte of the range can be read until `self` is dropped.
    pub fn as_ptr(&self) -> *const u8 {
        self.base as *const u8
    }
}

impl Drop for PageSwap {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(pager) = self.pager.take() {
            let _panicked = pager.join();
        }
        // SAFETY: mapped by `new`; whoever reads through `as_ptr` borrows `self`'s life.
        unsafe { libc::munmap(self.base as *mut _, self.length) };
    }
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: takes flags, gives a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    control(&fd, API, &mut [API_VERSION, 0, 0])?;
    Ok(fd)
}

fn control<const N: usize>(
    fd: &OwnedFd,
    request: libc::c_ulong,
    argument: &mut [u64; N],
) -> io::Result<()> {
    // SAFETY: every request here takes a structure of N words, as its size says.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument.as_mut_ptr()) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn pipe() -> io::Result<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: writes two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to us.
    let read = unsafe { File::from_raw_fd(ends[0]) };
    // SAFETY: this one as well.
    let write = unsafe { File::from_raw_fd(ends[1]) };
    Ok((read, write))
}

/// The address of the next fault; nothing when the range is to end.
fn next_fault(fd: &OwnedFd, ended: &File) -> Option<u64> {
    loop {
        let watch = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut both = [watch(fd.as_raw_fd()), watch(ended.as_raw_fd())];
        // SAFETY: two entries.
        let ready = unsafe { libc::poll(both.as_mut_ptr(), 2, -1) };
        if ready < 0 {
            continue;
        }
        if both[1].revents != 0 {
            return None;
        }
        let mut message = [0u8; 32];
        // SAFETY: reads one message, which has 32 bytes.
        let read =
            unsafe { libc::read(fd.as_raw_fd(), message.as_mut_ptr().cast(), message.len()) };
        if read == 32 && message[0] == EVENT_PAGE_FAULT {
            let mut address = [0; 8];
            address.copy_from_slice(&message[16..24]);
            return Some(u64::from_le_bytes(address));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{PAGE, PageSwap};

    #[test]
    fn every_page_is_what_was_fetched_though_few_are_here() {
        crate::require!(crate::capability::Capability::Userfaultfd);
        let swap = PageSwap::new(64 * PAGE, 4, |page, into| into.fill(page as u8)).unwrap();
        for round in 0..3 {
            for page in 0..64 {
                let page = (page * 7 + round) % 64;
                // SAFETY: within the range, which lives.
                let byte = unsafe { swap.as_ptr().wrapping_add(page * PAGE + 9).read_volatile() };
                assert_eq!(usize::from(byte), page);
            }
        }
    }
}
