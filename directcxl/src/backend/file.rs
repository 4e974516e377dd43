//! A pool in a file: on tmpfs, on hugetlbfs, on an ordinary or a DAX file system.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carlsbad_types::ByteSize;
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

use super::opened::{Opened, answers, regular, sayings};
use super::room::{Taken, punch_hole, take, was_full};
use super::{Backend, Coherence, Geometry, Health, Identity, Persistence, boot_incarnation};
use crate::HostId;
use crate::error::{Error, Result};
use crate::layout::EXTENT;

/// A file that holds a pool.
#[derive(Debug)]
pub struct FileHdm {
    opened: Opened,
    path: PathBuf,
}

impl FileHdm {
    /// Makes a file of `length` bytes, rounded up to 2 MiB, without anything in it. On hugetlbfs its
    /// pages are reserved when they are mapped; elsewhere they are taken when they are touched.
    ///
    /// # Errors
    /// Where there is such a file already, or none can be made there.
    pub fn create(path: impl Into<PathBuf>, length: ByteSize) -> Result<Self> {
        let path = path.into();
        let place = path.display().to_string();
        let length = length
            .round_up(ByteSize::new(EXTENT))
            .filter(|length| *length > ByteSize::ZERO && length.get() <= i64::MAX as u64)
            .ok_or_else(|| Error::BadGeometry {
                place: place.clone(),
                why: format!("{length} is no length of a file"),
                fix: "ask for at least 8 MiB and less than 8 EiB".to_owned(),
            })?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(Error::io("create", &*place))?;
        let made = file
            .set_len(length.get())
            .map_err(Error::io("set the length of", &*place))
            .and_then(|()| Self::of(file, path.clone(), true));
        if made.is_err() {
            // Nobody else has seen it: it was made above.
            let _already_gone = std::fs::remove_file(&path);
        }
        made
    }

    /// Opens a file for reading and writing.
    ///
    /// # Errors
    /// Where there is none, or it is not a regular file, or this process may not write to it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file = open(&path, true)?;
        Self::of(file, path, true)
    }

    /// Opens a file for reading. What is attached through it is protected by the lease that this
    /// host's kernel keeps; it leaves no lease for other hosts.
    ///
    /// # Errors
    /// Where there is none, or it is not a regular file, or this process may not read it.
    pub fn open_read_only(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file = open(&path, false)?;
        Self::of(file, path, false)
    }

    /// Makes every change wait for the disk, on a file system that has one.
    #[must_use]
    pub fn synced(mut self) -> Self {
        if self.opened.geometry.persistence == Persistence::PageCache {
            self.opened.geometry.persistence = Persistence::Synced;
        }
        self
    }

    fn of(file: File, path: PathBuf, writable: bool) -> Result<Self> {
        let place = path.display().to_string();
        let metadata = regular(&file, &place)?;
        let system = fstatfs(&file).map_err(Error::io("look at the file system of", &*place))?;
        let kind = system.filesystem_type();
        let alignment = match kind {
            HUGETLBFS_MAGIC => system.optimal_transfer_size() as u64,
            _ => page_size(),
        };
        if alignment > EXTENT {
            return Err(Error::BadGeometry {
                place,
                why: format!("its pages are of {}", ByteSize::new(alignment)),
                fix: "mount hugetlbfs with pagesize=2M".to_owned(),
            });
        }
        let in_memory = [HUGETLBFS_MAGIC, TMPFS_MAGIC].contains(&kind);
        Ok(Self {
            opened: Opened {
                geometry: Geometry {
                    length: ByteSize::new(metadata.len()),
                    alignment: ByteSize::new(alignment),
                    persistence: if in_memory {
                        Persistence::Volatile
                    } else {
                        Persistence::PageCache
                    },
                    coherence: Coherence::Hardware,
                    numa_node: None,
                    writable,
                },
                identity: Identity {
                    place,
                    serial: format!("{}:{}", metadata.dev(), metadata.ino()),
                    incarnation: if in_memory { boot_incarnation() } else { 0 },
                },
                host: HostId::default(),
                file,
            },
            path,
        })
    }
}

sayings!(FileHdm);

impl Backend for FileHdm {
    answers!();

    fn discard(&self, range: Range<u64>) -> Result<bool> {
        // The pages of hugetlbfs were reserved for this file: without them a later touch is a bus
        // error.
        if self.opened.geometry.alignment.get() > page_size() {
            return Ok(false);
        }
        punch_hole(self.as_fd(), self.place(), range)
    }

    fn reserve(&self, range: Range<u64>) -> Result<bool> {
        let offset = range.start;
        match take(self.as_fd(), &range) {
            Ok(Taken::All) => Ok(true),
            Ok(Taken::Unknown) => Ok(false),
            Ok(Taken::Full) => Err(self.full(range.end - offset, offset)),
            Err(why) => Err(Error::io("take memory of", self.place())(why)),
        }
    }

    fn health(&self) -> Health {
        match self.opened.file.metadata() {
            Ok(now) if now.len() >= self.opened.geometry.length.get() && now.nlink() > 0 => {
                Health::Ok
            }
            _ => Health::Removed,
        }
    }

    fn reopen(&self) -> Result<Arc<dyn Backend>> {
        let mut again = if self.opened.geometry.writable {
            Self::open(&self.path)?
        } else {
            Self::open_read_only(&self.path)?
        };
        again.opened.as_said_of(&self.opened);
        again.opened.geometry.persistence = self.opened.geometry.persistence;
        Ok(Arc::new(again))
    }

    fn map_error(&self, length: u64, why: io::Error) -> Error {
        let huge = self.opened.geometry.alignment.get() > page_size();
        if huge && why.raw_os_error() == Some(libc::ENOMEM) {
            return self.full(length, 0);
        }
        Error::io("map", self.place())(why)
    }

    fn bus_error(&self, offset: u64) -> Error {
        let page = self.opened.geometry.alignment.get().max(1);
        let start = offset / page * page;
        let touched = start..start.saturating_add(page);
        // A file that does not answer any more is gone.
        if was_full(&self.opened.file, &touched, self.opened.geometry.writable).unwrap_or(false) {
            return self.full(page, offset);
        }
        Error::Removed {
            place: self.place(),
            offset,
        }
    }
}

impl FileHdm {
    /// Why there are no more pages.
    fn full(&self, asked: u64, offset: u64) -> Error {
        let place = self.place();
        let page = self.opened.geometry.alignment.get();
        if page <= page_size() {
            return Error::NoSpace { place, offset };
        }
        Error::NoHugePages {
            place,
            asked: ByteSize::new(asked),
            pages: asked.div_ceil(page),
            pool: format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10),
        }
    }
}

/// Opens without waiting: a pipe would have this wait for somebody at its other end.
fn open(path: &Path, write: bool) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::io("open", path.display().to_string()))
}

/// Bytes of an ordinary page.
pub(crate) fn page_size() -> u64 {
    // SAFETY: `sysconf` takes any name.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

/// The path of this process' descriptor.
pub(super) fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    use std::os::fd::AsRawFd;
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}
