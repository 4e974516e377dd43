//! The read-only half: a file that every sandbox shares, in one page cache.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::beneath::remove_tree;
use super::layers::{Layer, LayerLimits, unpack};
use super::store::open_directory;
use crate::error::{Error, Result};

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Format {
    /// An erofs file, made by `mkfs.erofs`. Mounted without a loop device where the kernel can
    /// (6.12).
    Erofs,
    /// A squashfs file, made by `mksquashfs`. Mounted through a loop device.
    Squashfs,
    /// A plain directory, which nobody may change while it is in use.
    Directory,
}

impl Format {
    /// The kernel's name of the file system.
    pub(super) const fn kernel_name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Squashfs => "squashfs",
            Self::Directory => "directory",
        }
    }
}

/// A read-only root file system.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Image {
    path: PathBuf,
    format: Format,
}

impl Image {
    /// A directory as it is. Nobody may change it while it is in use.
    ///
    /// # Errors
    /// Where it is no directory.
    pub fn directory(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let found = path.canonicalize().map_err(Error::rootfs("open", path))?;
        if !found.is_dir() {
            return Err(Error::Rootfs {
                path: found,
                why: "it is no directory; Image::open opens image files".to_owned(),
            });
        }
        Ok(Self {
            path: found,
            format: Format::Directory,
        })
    }

    /// An erofs or squashfs file; which it is stands in its superblock.
    ///
    /// # Errors
    /// Where it is neither.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let found = path.canonicalize().map_err(Error::rootfs("open", path))?;
        let format = recognise(&found).map_err(Error::rootfs("read", path))?;
        let Some(format) = format else {
            return Err(Error::Rootfs {
                path: found,
                why: "it is neither an erofs nor a squashfs image".to_owned(),
            });
        };
        Ok(Self {
            path: found,
            format,
        })
    }

    /// Unpacks layers, lowest first, and makes an image of them at `path`, which appears when it
    /// is complete. A [`Format::Directory`] is what was unpacked.
    ///
    /// # Errors
    /// As [`unpack`]; where `path` is there already; where `mkfs.erofs` or `mksquashfs` is not
    /// installed, or fails. Nothing is left then.
    pub fn build(
        layers: &[Layer],
        path: impl AsRef<Path>,
        format: Format,
        limits: &LayerLimits,
    ) -> Result<Self> {
        let path = path.as_ref();
        if path.symlink_metadata().is_ok() {
            return Err(Error::rootfs("make", path)(io::Error::from(
                io::ErrorKind::AlreadyExists,
            )));
        }
        let staging = Staging::beside(path)?;
        let tree = staging.0.join("tree");
        std::fs::create_dir(&tree).map_err(Error::rootfs("make", &tree))?;
        unpack(layers, &tree, limits)?;
        let made = match format {
            Format::Directory => tree,
            Format::Erofs => {
                let file = staging.0.join("image");
                // The time is fixed, so that equal layers make equal images.
                let mut command = Command::new("mkfs.erofs");
                command.args(["--quiet", "-T0"]).arg(&file).arg(&tree);
                run(command, "erofs-utils", path)?;
                file
            }
            Format::Squashfs => {
                let file = staging.0.join("image");
                let mut command = Command::new("mksquashfs");
                command.arg(&tree).arg(&file);
                command.args(["-quiet", "-no-progress", "-noappend", "-mkfs-time", "0"]);
                run(command, "squashfs-tools", path)?;
                file
            }
        };
        std::fs::rename(&made, path).map_err(Error::rootfs("put in place", path))?;
        let path = path.canonicalize().map_err(Error::rootfs("open", path))?;
        Ok(Self { path, format })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub fn format(&self) -> Format {
        self.format
    }
}

fn recognise(path: &Path) -> io::Result<Option<Format>> {
    use std::os::unix::fs::FileExt;

    /// Where erofs has its superblock (Documentation/filesystems/erofs.rst).
    const EROFS_AT: u64 = 1024;
    const EROFS: [u8; 4] = 0xE0F5_E1E2u32.to_le_bytes();
    const SQUASHFS: &[u8; 4] = b"hsqs";

    let file = std::fs::File::open(path)?;
    let mut magic = [0; 4];
    let mut has =
        |at, wanted: &[u8; 4]| file.read_exact_at(&mut magic, at).is_ok() && magic == *wanted;
    Ok(if has(EROFS_AT, &EROFS) {
        Some(Format::Erofs)
    } else if has(0, SQUASHFS) {
        Some(Format::Squashfs)
    } else {
        None
    })
}

fn run(mut command: Command, package: &str, image: &Path) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).output();
    let why = match done {
        Ok(done) if done.status.success() => return Ok(()),
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr);
            let last: String = said.trim().chars().take(500).collect();
            format!("{program}: {}: {last}", done.status)
        }
        Err(why) if why.kind() == io::ErrorKind::NotFound => {
            format!("{program} is not installed: apt install {package}")
        }
        Err(why) => format!("{program}: {why}"),
    };
    Err(Error::Rootfs {
        path: image.to_owned(),
        why,
    })
}

/// A directory beside what is being made, on the same file system, that goes away again.
struct Staging(PathBuf);

impl Staging {
    fn beside(path: &Path) -> Result<Self> {
        let folder = path.parent().filter(|one| !one.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let staging = folder.join(format!(".rund-{:016x}", fastrand::u64(..)));
        std::fs::create_dir(&staging).map_err(Error::rootfs("make", &staging))?;
        Ok(Self(staging))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let folder = self.0.parent().unwrap_or(Path::new("."));
        let name = self.0.file_name().unwrap_or_default();
        // As deep as a layer may be.
        let _best_effort = open_directory(folder).map(|folder| remove_tree(&folder, name));
    }
}
