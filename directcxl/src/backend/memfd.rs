//! A pool in memory without a name: for one process and those it starts.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use carlsbad_types::ByteSize;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::file::{page_size, path_of};
use super::opened::{Opened, answers, regular, sayings};
use super::room::{Taken, punch_hole, take, was_full};
use super::{Backend, Coherence, Geometry, Health, Identity, Persistence, boot_incarnation};
use crate::HostId;
use crate::error::{Error, Result};
use crate::layout::EXTENT;

/// Memory without a name. It goes when the last process that has it open or mapped is gone; another
/// process gets it by descriptor ([`MemfdHdm::from_fd`]).
#[derive(Debug)]
pub struct MemfdHdm {
    opened: Opened,
}

impl MemfdHdm {
    /// Memory of `length` bytes, rounded up to 2 MiB. Pages are taken when they are touched.
    ///
    /// # Errors
    /// Where the kernel refuses, or `length` is zero.
    pub fn new(length: ByteSize) -> Result<Self> {
        let place = || "memory of this process".to_owned();
        let length = length
            .round_up(ByteSize::new(EXTENT))
            .filter(|length| *length > ByteSize::ZERO && length.get() <= i64::MAX as u64)
            .ok_or_else(|| Error::BadGeometry {
                place: place(),
                why: format!("{length} is no length"),
                fix: "ask for at least 8 MiB and less than 8 EiB".to_owned(),
            })?;
        let file: File = memfd_create("directcxl", MFdFlags::MFD_CLOEXEC)
            .map_err(Error::io("make", place()))?
            .into();
        file.set_len(length.get())
            .map_err(Error::io("set the length of", place()))?;
        Self::of(file)
    }

    /// The memory behind a descriptor that another process made by [`MemfdHdm::new`] and passed on.
    /// It is opened anew, so that the two exclude each other where they have to.
    ///
    /// # Errors
    /// Where the descriptor is not one of a memory file.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let path = path_of(fd.as_fd());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(Error::io("open anew", path.display().to_string()))?;
        Self::of(file)
    }

    fn of(file: File) -> Result<Self> {
        let metadata = regular(&file, "a descriptor of memory")?;
        Ok(Self {
            opened: Opened {
                geometry: Geometry {
                    length: ByteSize::new(metadata.len()),
                    alignment: ByteSize::new(page_size()),
                    persistence: Persistence::Volatile,
                    coherence: Coherence::Hardware,
                    numa_node: None,
                    writable: true,
                },
                identity: Identity {
                    place: format!("memfd {}", metadata.ino()),
                    serial: format!("{}:{}", metadata.dev(), metadata.ino()),
                    incarnation: boot_incarnation(),
                },
                host: HostId::default(),
                file,
            },
        })
    }
}

sayings!(MemfdHdm);

impl Backend for MemfdHdm {
    answers!();

    fn discard(&self, range: Range<u64>) -> Result<bool> {
        punch_hole(self.as_fd(), self.place(), range)
    }

    fn reserve(&self, range: Range<u64>) -> Result<bool> {
        let (place, offset) = (self.place(), range.start);
        match take(self.as_fd(), &range) {
            Ok(Taken::All) => Ok(true),
            Ok(Taken::Unknown) => Ok(false),
            Ok(Taken::Full) => Err(Error::NoSpace { place, offset }),
            Err(why) => Err(Error::io("take memory of", place)(why)),
        }
    }

    fn bus_error(&self, offset: u64) -> Error {
        let page = self.opened.geometry.alignment.get().max(1);
        let start = offset / page * page;
        let touched = start..start.saturating_add(page);
        let place = self.place();
        if was_full(&self.opened.file, &touched, true).unwrap_or(false) {
            return Error::NoSpace { place, offset };
        }
        Error::Removed { place, offset }
    }

    fn health(&self) -> Health {
        match self.opened.file.metadata() {
            Ok(now) if now.len() >= self.opened.geometry.length.get() => Health::Ok,
            _ => Health::Removed,
        }
    }

    fn reopen(&self) -> Result<Arc<dyn Backend>> {
        let fd = self
            .opened
            .file
            .try_clone()
            .map_err(Error::io("duplicate", self.place()))?;
        let mut again = Self::from_fd(fd.into())?;
        again.opened.as_said_of(&self.opened);
        Ok(Arc::new(again))
    }
}
