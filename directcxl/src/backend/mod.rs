//! Where the bytes of a pool lie: a file, memory without a name, or a device.

mod devdax;
mod file;
mod memfd;
mod opened;
mod room;

pub use devdax::DevDax;
pub(crate) use devdax::usable;
pub use file::FileHdm;
pub use memfd::MemfdHdm;

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use carlsbad_types::ByteSize;

use crate::HostId;
use crate::error::{Error, Result};
use crate::medium::{Access, Medium};

/// A host-managed device memory (HDM), or what stands in for one. It is opened already, and says
/// what it is; it decides nothing.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Its size and its kind.
    fn geometry(&self) -> &Geometry;

    /// Which one it is.
    fn identity(&self) -> &Identity;

    /// Which of the hosts that share it this one is.
    fn host(&self) -> HostId;

    /// The descriptor that it is mapped and locked by. Each backend has an open file description of
    /// its own, so that two in one process exclude each other.
    fn as_fd(&self) -> BorrowedFd<'_>;

    /// Maps a range, whose ends are multiples of the alignment.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn map(
        self: Arc<Self>,
        range: Range<u64>,
        access: Access,
        populate: bool,
    ) -> Result<Box<dyn Medium>>;

    /// Makes a range read as zero without writing it, and gives its memory back; says whether it
    /// could. Nobody has it mapped.
    ///
    /// # Errors
    /// Where the kernel refuses although it knows how.
    fn discard(&self, range: Range<u64>) -> Result<bool> {
        let _not_here = range;
        Ok(false)
    }

    /// Takes the memory of a range now, so that no later touch of it fails for want of room; says
    /// whether it could. What is there stays.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::NoHugePages`] where there is not as much.
    fn reserve(&self, range: Range<u64>) -> Result<bool> {
        let _not_here = range;
        Ok(false)
    }

    /// Whether it is still there and whole.
    fn health(&self) -> Health;

    /// The same one opened anew, for another process or pool in this one.
    ///
    /// # Errors
    /// Where it is gone, or this process may not open it.
    fn reopen(&self) -> Result<Arc<dyn Backend>>;

    /// Its name, for messages.
    fn place(&self) -> String {
        self.identity().place.clone()
    }

    /// What a refused mapping of `length` bytes means.
    fn map_error(&self, _length: u64, why: io::Error) -> Error {
        Error::io("map", self.place())(why)
    }

    /// What a bus error at an offset means that was not poison: without it, that the memory is gone.
    fn bus_error(&self, offset: u64) -> Error {
        Error::Removed {
            place: self.place(),
            offset,
        }
    }
}

/// Size and kind of a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes that can be mapped.
    pub length: ByteSize,
    /// Mappings begin and end at multiples of it.
    pub alignment: ByteSize,
    /// What its bytes survive.
    pub persistence: Persistence,
    /// Who keeps the hosts' caches coherent.
    pub coherence: Coherence,
    /// The NUMA node that is nearest to it, where the kernel knows.
    pub numa_node: Option<u32>,
    /// Whether it can be written to.
    pub writable: bool,
}

/// What bytes survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Persistence {
    /// The end of every process, while the host and the device have power.
    Volatile,
    /// As `Volatile`; and a power failure, as far as the kernel has written them to disk by then.
    PageCache,
    /// A power failure, from when a change is said to be done: it waits for the disk.
    Synced,
    /// A power failure, from when they are written back from the caches: persistent memory.
    Power,
}

/// Who keeps the caches of the hosts that share a memory coherent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Coherence {
    /// Hardware: one host, or CXL 3 back-invalidation. `publish` and `acquire` have nothing to do.
    Hardware,
    /// Software: several hosts on CXL 2.0. `publish` writes lines back, `acquire` drops them.
    Software,
}

/// Which device or file it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its path, or what it is called in messages.
    pub place: String,
    /// Serial numbers of the devices behind it, or device and inode of a file.
    pub serial: String,
    /// Changes when what was there is gone for certain, as after a restart of volatile memory; zero
    /// where nothing tells. The pool's own incarnation changes when it is formatted.
    pub incarnation: u64,
}

/// Whether a backend is still there and whole.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// It is there, and reports no error.
    Ok,
    /// It was removed, or is shorter than it was.
    Removed,
    /// These ranges report errors that cannot be corrected.
    Poisoned(Vec<Range<u64>>),
}

/// Reads a small file of sysfs, without its line end.
pub(crate) fn attribute(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim_end().to_owned())
}

/// Reads a number of sysfs, decimal or with `0x`.
pub(crate) fn number(path: &Path) -> Option<u64> {
    parse_number(&attribute(path)?)
}

pub(crate) fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// What changes with every start of the machine.
pub(crate) fn boot_incarnation() -> u64 {
    attribute(Path::new("/proc/sys/kernel/random/boot_id"))
        .and_then(|text| uuid::Uuid::parse_str(&text).ok())
        .map_or(0, |id| id.as_u64_pair().0)
}
