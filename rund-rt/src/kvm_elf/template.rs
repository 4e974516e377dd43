//! A template: a guest's memory and registers at one point of its life, in a file in memory that
//! nobody can change any more; and the same on disk, with a version and a checksum.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use crate::backend::SnapshotPoint;
use crate::error::{Error, Result};

use super::calls::signal::Signals;
use super::calls::space::Space;
use super::elf::LoadPlan;
use super::layout::{LARGE, MOST_MEMORY, PAGE};
use super::machine::Registers;
use super::memory::Extent;

/// First bytes of a saved template.
const MAGIC: &[u8; 8] = b"rund-tpl";
/// Version of what follows. A template of another version is built again.
const VERSION: u32 = 1;
/// The largest description that is read.
const MOST_STATE: u64 = 16 << 20;

/// All of a template but its pages.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// The processor that it was built on, as [`Host::processor`](super::machine::Host::processor)
    /// says it.
    pub processor: String,
    /// Whether the entry code returns by `sysretq`.
    pub sysret: bool,
    /// The guest's memory in bytes.
    pub memory: u64,
    /// How the program is loaded.
    pub plan: LoadPlan,
    /// Root of the page tables.
    pub root: u64,
    /// The pages, and where they are in the file.
    pub extents: Vec<Extent>,
    /// Where the program's own file lies in the file, and its length.
    pub program: (u64, u64),
    /// The program's path inside.
    pub program_path: Vec<u8>,
    /// When it was saved.
    pub snapshot: SnapshotPoint,
    /// Registers; none where clones begin at the entry.
    pub registers: Option<Registers>,
    /// Arguments.
    pub args: Vec<Vec<u8>>,
    /// Environment.
    pub env: Vec<Vec<u8>>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// What Linux knew of the process.
    pub process: Process,
}

/// What Linux knew of a process when its template was saved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Process {
    /// Heap and mappings.
    pub space: Space,
    /// Heap break and next address for `mmap`.
    pub marks: (u64, u64),
    /// Handlers and mask.
    pub signals: Signals,
    /// Rights that new files do not get.
    pub umask: u32,
    /// Name.
    pub name: [u8; 16],
    /// Descriptors beyond the first three.
    pub open: Vec<(u64, SavedOpen, bool)>,
    /// Answers that would have differed between clones.
    pub draws: u32,
}

/// A descriptor of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedOpen {
    /// The same as another descriptor.
    Same(u64),
    /// A regular file of the read-only layer: path and position.
    File(Vec<u8>, u64),
    /// A directory.
    Directory(Vec<u8>),
    /// `/dev/null`.
    Null,
    /// `/dev/zero`.
    Zero,
    /// `/dev/urandom`.
    Random,
}

impl State {
    /// Whether all its numbers can be: a description that was not written here is not followed
    /// anywhere.
    ///
    /// # Errors
    /// What cannot be, in words.
    pub fn check(&self, file_len: u64) -> std::result::Result<(), String> {
        if self.memory > MOST_MEMORY || !self.memory.is_multiple_of(LARGE) {
            return Err(format!("a memory of {} bytes", self.memory));
        }
        let mut end = 0;
        for extent in &self.extents {
            let aligned = [extent.offset, extent.file_offset, extent.len]
                .iter()
                .all(|n| n % PAGE == 0);
            let inside =
                |at: u64, most: u64| at.checked_add(extent.len).is_some_and(|end| end <= most);
            if !aligned
                || extent.len == 0
                || extent.offset < end
                || !inside(extent.offset, self.memory)
                || !inside(extent.file_offset, file_len)
            {
                return Err("pages outside of it".into());
            }
            end = extent.offset + extent.len;
        }
        self.plan.check()?;
        let (offset, len) = self.program;
        if !offset.is_multiple_of(PAGE) || offset.checked_add(len).is_none_or(|end| end > file_len)
        {
            return Err("a program outside of it".into());
        }
        if !self.root.is_multiple_of(PAGE) || self.root >= LARGE {
            return Err("page tables outside of it".into());
        }
        if (self.snapshot == SnapshotPoint::Entry) != self.registers.is_none() {
            return Err("registers that do not fit".into());
        }
        Ok(())
    }
}

/// A new file in memory.
///
/// # Errors
/// Where there is no memory for it.
pub fn new_file() -> nix::Result<OwnedFd> {
    memfd_create(
        c"rund-template",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )
}

/// Makes a file in memory unchangeable.
///
/// # Errors
/// Where it is none, or is mapped writable by somebody.
pub fn seal(file: &impl AsFd) -> nix::Result<()> {
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map(drop)
}

/// Writes a template to disk: complete, or not at all.
///
/// # Errors
/// Where the file cannot be written.
pub fn save(state: &State, pages: &File, path: &Path) -> Result<()> {
    let cannot = |what| Error::io(what, path);
    let encoded = postcard::to_allocvec(state).map_err(|why| Error::BadTemplate {
        path: path.into(),
        why: why.to_string(),
    })?;
    let len = pages.metadata().map_err(cannot("measure"))?.len();
    let mut head = Vec::new();
    head.extend_from_slice(&(encoded.len() as u64).to_le_bytes());
    head.extend_from_slice(&len.to_le_bytes());
    head.extend_from_slice(&encoded);
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let unfinished = directory.join(format!(
        ".{}.{}.unfinished",
        path.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    let written = (|| {
        let mut file = File::create(&unfinished)?;
        file.write_all(MAGIC)?;
        file.write_all(&VERSION.to_le_bytes())?;
        // The checksum comes when all is known.
        file.write_all(&[0; 32])?;
        let mut hash = blake3::Hasher::new();
        hash.update(&head);
        file.write_all(&head)?;
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < len {
            let n = pages.read_at(&mut buffer, at)?;
            if n == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            hash.update(&buffer[..n]);
            file.write_all(&buffer[..n])?;
            at += n as u64;
        }
        file.write_all_at(hash.finalize().as_bytes(), HASH_AT)?;
        file.sync_all()?;
        std::fs::rename(&unfinished, path)
    })();
    if written.is_err() {
        let _gone = std::fs::remove_file(&unfinished);
    }
    written.map_err(cannot("write"))
}

const HASH_AT: u64 = 12;
const HEAD_AT: usize = 44;

/// Reads a template from disk into a sealed file in memory.
///
/// # Errors
/// [`Error::BadTemplate`] where it is damaged or of another version.
pub fn load(path: &Path) -> Result<(State, OwnedFd)> {
    let mut file = File::open(path).map_err(|why| Error::BadTemplate {
        path: path.into(),
        why: why.to_string(),
    })?;
    let bad = |why: &str| Error::BadTemplate {
        path: path.into(),
        why: why.to_owned(),
    };
    let mut start = [0; HEAD_AT + 16];
    file.read_exact(&mut start)
        .map_err(|_| bad("it is too short"))?;
    let (state_len, pages_len) = parse_start(&start).map_err(bad)?;
    let total = file.metadata().map_err(Error::io("measure", path))?.len();
    let expected = (HEAD_AT as u64 + 16)
        .checked_add(state_len)
        .and_then(|sum| sum.checked_add(pages_len));
    if expected != Some(total) {
        return Err(bad("its length is not what it says"));
    }
    let mut hash = blake3::Hasher::new();
    hash.update(&start[HEAD_AT..]);
    let mut encoded = vec![0; state_len as usize];
    file.read_exact(&mut encoded)
        .map_err(Error::io("read", path))?;
    hash.update(&encoded);

    let memory: File = new_file()
        .map_err(|why| Error::io("make", "memfd")(why.into()))?
        .into();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let n = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        memory
            .write_all_at(&buffer[..n], at)
            .map_err(Error::io("write", "memfd"))?;
        at += n as u64;
    }
    if hash.finalize().as_bytes()[..] != start[HASH_AT as usize..HEAD_AT] {
        return Err(bad("its checksum is wrong"));
    }
    let state = parse_state(&encoded, pages_len).map_err(|why| bad(&why))?;
    seal(&memory).map_err(|why| Error::io("seal", "memfd")(why.into()))?;
    Ok((state, memory.into()))
}

/// Lengths of description and pages.
fn parse_start(start: &[u8; HEAD_AT + 16]) -> std::result::Result<(u64, u64), &'static str> {
    let word = |at: usize| {
        let bytes = start.get(at..at + 8).and_then(|b| b.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    if start[..8] != MAGIC[..] {
        return Err("it is no template");
    }
    if start[8..12] != VERSION.to_le_bytes() {
        return Err("it is of another version");
    }
    let lengths = (word(HEAD_AT), word(HEAD_AT + 8));
    if lengths.0 > MOST_STATE || lengths.1 > 2 * MOST_MEMORY {
        return Err("its lengths cannot be");
    }
    Ok(lengths)
}

/// Reads a description, and checks it.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse_state(encoded: &[u8], pages_len: u64) -> std::result::Result<State, String> {
    let state: State = postcard::from_bytes(encoded).map_err(|why| why.to_string())?;
    state.check(pages_len)?;
    Ok(state)
}

/// A read-only view of a template's file, to copy pages back from.
#[derive(Debug)]
pub struct Pages {
    base: std::ptr::NonNull<u8>,
    len: usize,
}

impl Pages {
    /// Maps a template's file.
    ///
    /// # Errors
    /// Where there is no room for the mapping.
    pub fn map(file: &OwnedFd) -> nix::Result<Self> {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};
        let len = nix::sys::stat::fstat(file)?.st_size;
        let len = usize::try_from(len).unwrap_or(0);
        let size = std::num::NonZeroUsize::new(len).ok_or(nix::errno::Errno::EINVAL)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe { mmap(None, size, ProtFlags::PROT_READ, flags, file, 0) }?;
        Ok(Self {
            base: base.cast(),
            len,
        })
    }

    /// The bytes at `offset`.
    pub fn at(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let at = usize::try_from(offset).ok()?;
        if at.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: within the mapping.
        let start = unsafe { self.base.add(at) };
        // SAFETY: the file is sealed: nobody writes to it or cuts it short.
        Some(unsafe { std::slice::from_raw_parts(start.as_ptr(), len) })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        let _cannot_fail = unsafe { nix::sys::mman::munmap(self.base.cast(), self.len) };
    }
}
