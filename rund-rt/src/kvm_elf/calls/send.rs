//! `sendfile`: from a regular file to anything that can be written to, without a way through the
//! guest's memory.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use super::super::memory::GuestMemory;
use super::file::position;
use super::table::Open;
use super::{Answer, Kernel};

/// Bytes that are on the way at a time.
const PIECE: usize = 128 << 10;
/// The most of one call (Linux: `MAX_RW_COUNT`); programs call again.
const MOST: u64 = 16 << 20;

impl Kernel {
    /// `sendfile`
    pub fn sendfile(
        &mut self,
        memory: &GuestMemory,
        [to, from, offset_at, len]: [u64; 4],
    ) -> Answer {
        let source = self.table.get(from)?;
        let source = source.borrow();
        let Open::Host(file) = &*source else {
            return Err(Errno::EINVAL);
        };
        if !file.regular {
            return Err(Errno::EINVAL);
        }
        let target = self.table.get(to)?;
        // A file onto itself: what Linux does with it depends on the file system.
        let target = target.try_borrow().map_err(|_| Errno::EINVAL)?;
        let begin = if offset_at == 0 {
            position(file)?
        } else {
            memory.read_u64(offset_at)?
        };
        if i64::try_from(begin).is_err() {
            return Err(Errno::EINVAL);
        }
        let mut piece = vec![0; PIECE.min(len as usize)];
        let mut done = 0;
        let end = loop {
            let wanted = (len.min(MOST) - done).min(piece.len() as u64) as usize;
            let Some(place) = piece.get_mut(..wanted).filter(|place| !place.is_empty()) else {
                break Ok(());
            };
            let n = match nix::sys::uio::pread(&file.fd, place, (begin + done) as i64) {
                Ok(0) => break Ok(()),
                Ok(n) => n,
                Err(why) => break Err(why),
            };
            match self.put(&target, place.get(..n).unwrap_or_default()) {
                Ok(0) => break Ok(()),
                Ok(n) => done += n as u64,
                Err(why) => break Err(why),
            }
        };
        if offset_at != 0 {
            memory.write(offset_at, &(begin + done).to_le_bytes())?;
        } else {
            let at = libc::off_t::try_from(begin + done).map_err(|_| Errno::EOVERFLOW)?;
            // SAFETY: a descriptor of ours.
            let _at = unsafe { libc::lseek(file.fd.as_raw_fd(), at, libc::SEEK_SET) };
        }
        match end {
            // What was sent is said first; the next call finds the reason again.
            Err(why) if done == 0 => Err(why),
            _ => Ok(done as i64),
        }
    }

    /// Writes to what is open; gives how much.
    fn put(&mut self, target: &Open, bytes: &[u8]) -> Result<usize, Errno> {
        match target {
            Open::Host(file) => {
                let write = || nix::unistd::write(file.fd.as_fd(), bytes).map(|n| n as i64);
                Ok(self.put_file(file, None, bytes.len() as u64, write)? as usize)
            }
            Open::Captured(stream) => {
                self.outputs.take(*stream, bytes);
                Ok(bytes.len())
            }
            Open::Null | Open::Zero | Open::Random => Ok(bytes.len()),
            Open::Directory(_) | Open::Bytes { .. } => Err(Errno::EBADF),
        }
    }
}
