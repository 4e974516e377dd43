//! Fingerprints: is a tensor certainly new, or may it be stored already?
//!
//! An identity takes reading and hashing every byte. A new tensor has to be read once to be stored
//! as well, and should not be read twice. So a few samples of it are hashed first: if no stored
//! tensor has that fingerprint, it is new, and is hashed while it is written. Otherwise it is only
//! hashed, since it is most likely there. A fingerprint decides about the order of the work, never
//! about what a tensor is.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::backing::read_dir;
use crate::error::{Error, Result};
use crate::id::ObjectId;
use crate::root::replace_link;
use crate::source::{ModelSource, SourceTensor};

/// Sampled places, evenly spread from the first bytes to the last.
const SAMPLES: u64 = 8;
/// Bytes sampled at each.
const SAMPLE: u64 = 256;

/// XXH3-128 over element type, shape and samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Fingerprint(u128);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Fingerprint {
    /// Samples tensor `index` of `source`.
    pub(crate) fn of(
        source: &dyn ModelSource,
        index: usize,
        tensor: &SourceTensor,
    ) -> Result<Self> {
        let mut hasher = Xxh3::new();
        hasher.update(tensor.element.name().as_bytes());
        for &extent in tensor.shape.dims() {
            hasher.update(&(extent as u64).to_le_bytes());
        }
        let mut block = [0; SAMPLE as usize];
        let span = tensor.len.saturating_sub(SAMPLE);
        for i in 0..SAMPLES {
            // In 128 bits: the product may exceed 64.
            let offset = (u128::from(span) * u128::from(i) / u128::from(SAMPLES - 1)) as u64;
            let block = &mut block[..SAMPLE.min(tensor.len) as usize];
            source.read_at(index, offset, block)?;
            hasher.update(block);
        }
        Ok(Self(hasher.digest128()))
    }
}

/// The stored files by fingerprint.
#[derive(Debug)]
pub(crate) struct Hints {
    dir: PathBuf,
}

impl Hints {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The file last stored under `fingerprint`. It may be gone.
    pub(crate) fn get(&self, fingerprint: Fingerprint) -> Result<Option<ObjectId>> {
        let path = self.dir.join(fingerprint.to_string());
        match fs::read_link(&path) {
            Ok(target) => Ok(target.to_str().and_then(|text| text.parse().ok())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Notes that `object` is stored under `fingerprint`.
    pub(crate) fn set(
        &self,
        fingerprint: Fingerprint,
        object: &ObjectId,
        tmp: &Path,
    ) -> Result<()> {
        let path = self.dir.join(fingerprint.to_string());
        match std::os::unix::fs::symlink(object.to_string(), &path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                replace_link(&object.to_string(), &path, tmp)
            }
            done => done.map_err(Error::io("note a fingerprint in", path)),
        }
    }

    /// Forgets the fingerprints of files that are not `kept`.
    pub(crate) fn forget(&self, kept: impl Fn(&ObjectId) -> Result<bool>) -> Result<()> {
        for hint in read_dir(&self.dir)? {
            let target = fs::read_link(hint.path()).ok();
            let object = target.and_then(|target| target.to_str()?.parse().ok());
            if object.is_some_and(|object| kept(&object).unwrap_or(true)) {
                continue;
            }
            match fs::remove_file(hint.path()) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("remove", hint.path())(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
