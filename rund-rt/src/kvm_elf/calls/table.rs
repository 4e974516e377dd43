//! A guest process' descriptors, and what they are open on.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use nix::errno::Errno;

use super::account::Held;

/// The most descriptors of one guest process.
pub const MOST_DESCRIPTORS: usize = 256;

/// What a descriptor is open on. After a guest's `dup` or fork several descriptors share one.
#[derive(Debug)]
pub enum Open {
    /// A file of the host's: a regular one within the layers, a pipe, or what the owner gave.
    Host(HostFile),
    /// A directory within the layers.
    Directory(Listing),
    /// Standard input that was given as bytes.
    Bytes {
        /// All of them.
        bytes: Rc<[u8]>,
        /// The next one.
        at: usize,
    },
    /// Output that goes to the owner: stream 1 or 2.
    Captured(u8),
    /// `/dev/null`.
    Null,
    /// `/dev/zero`.
    Zero,
    /// `/dev/urandom` and `/dev/random`.
    Random,
}

/// A file of the host's.
#[derive(Debug)]
pub struct HostFile {
    /// The host's descriptor.
    pub fd: OwnedFd,
    /// Whether it is a regular file of the writable layer, open for writing: its growth counts.
    pub upper: bool,
    /// Whether it is a regular file.
    pub regular: bool,
    /// Its absolute path inside, where it has one.
    pub path: Vec<u8>,
    /// That it is open, where it is of the writable layer.
    pub held: Option<Rc<Held>>,
}

/// A directory that is open.
#[derive(Debug)]
pub struct Listing {
    /// Its absolute path inside.
    pub path: Vec<u8>,
    /// What it lists, once it was read from; and the next entry.
    pub entries: Option<(Vec<Entry>, usize)>,
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: Vec<u8>,
    /// Its inode number.
    pub inode: u64,
    /// Its kind, as in `d_type`.
    pub kind: u8,
}

/// An open file description, shared by whoever has it.
pub type Shared = Rc<RefCell<Open>>;

/// One descriptor.
#[derive(Debug, Clone)]
pub struct Slot {
    /// What it is open on.
    pub open: Shared,
    /// Whether it is closed by `execve`.
    pub close_on_exec: bool,
}

/// All descriptors of a guest process.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Option<Slot>>,
}

impl Table {
    /// What `fd` is open on.
    ///
    /// # Errors
    /// EBADF.
    pub fn get(&self, fd: u64) -> Result<Shared, Errno> {
        self.slot(fd).map(|slot| Rc::clone(&slot.open))
    }

    /// The descriptor `fd`.
    ///
    /// # Errors
    /// EBADF.
    pub fn slot(&self, fd: u64) -> Result<&Slot, Errno> {
        usize::try_from(fd)
            .ok()
            .and_then(|fd| self.slots.get(fd)?.as_ref())
            .ok_or(Errno::EBADF)
    }

    /// Changes the flag of `fd`.
    ///
    /// # Errors
    /// EBADF.
    pub fn set_close_on_exec(&mut self, fd: u64, close: bool) -> Result<(), Errno> {
        let slot = usize::try_from(fd)
            .ok()
            .and_then(|fd| self.slots.get_mut(fd)?.as_mut())
            .ok_or(Errno::EBADF)?;
        slot.close_on_exec = close;
        Ok(())
    }

    /// Opens the lowest free descriptor that is at least `least`.
    ///
    /// # Errors
    /// EMFILE where there are too many.
    pub fn add(&mut self, open: Shared, close_on_exec: bool, least: usize) -> Result<u64, Errno> {
        if least >= MOST_DESCRIPTORS {
            return Err(Errno::EINVAL);
        }
        let free = self.slots.iter().skip(least).position(Option::is_none);
        let at = free.map_or(self.slots.len().max(least), |at| at + least);
        if at >= MOST_DESCRIPTORS {
            return Err(Errno::EMFILE);
        }
        self.put(at, open, close_on_exec);
        Ok(at as u64)
    }

    /// Opens `open` as a new descriptor.
    ///
    /// # Errors
    /// EMFILE where there are too many.
    pub fn open(&mut self, open: Open, close_on_exec: bool) -> Result<u64, Errno> {
        self.add(Rc::new(RefCell::new(open)), close_on_exec, 0)
    }

    /// Makes `fd` what `open` is.
    ///
    /// # Errors
    /// EBADF where the number is too large.
    pub fn replace(&mut self, fd: u64, open: Shared, close_on_exec: bool) -> Result<(), Errno> {
        let at = usize::try_from(fd).unwrap_or(usize::MAX);
        if at >= MOST_DESCRIPTORS {
            return Err(Errno::EBADF);
        }
        self.put(at, open, close_on_exec);
        Ok(())
    }

    fn put(&mut self, at: usize, open: Shared, close_on_exec: bool) {
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, || None);
        }
        self.slots[at] = Some(Slot {
            open,
            close_on_exec,
        });
    }

    /// Closes `fd`.
    ///
    /// # Errors
    /// EBADF.
    pub fn close(&mut self, fd: u64) -> Result<(), Errno> {
        let slot = usize::try_from(fd)
            .ok()
            .and_then(|fd| self.slots.get_mut(fd))
            .and_then(Option::take);
        slot.map(drop).ok_or(Errno::EBADF)
    }

    /// Closes what `execve` closes.
    pub fn close_on_exec(&mut self) {
        for slot in &mut self.slots {
            if slot.as_ref().is_some_and(|slot| slot.close_on_exec) {
                *slot = None;
            }
        }
    }

    /// Closes all.
    pub fn clear(&mut self) {
        self.slots.clear();
    }

    /// Numbers and what they are open on.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Shared)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(fd, slot)| Some((fd as u64, &slot.as_ref()?.open)))
    }
}

impl Open {
    /// The host's descriptor, where there is one.
    pub fn host(&self) -> Option<RawFd> {
        match self {
            Self::Host(file) => Some(file.fd.as_raw_fd()),
            _ => None,
        }
    }
}
