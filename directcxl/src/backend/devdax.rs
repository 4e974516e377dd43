//! A pool on a device: `/dev/daxX.Y`, which maps CXL or persistent memory without a file system.
//!
//! What the kernel does there is not what it does for files: the length of such a device is 0 to
//! `stat`, `pread` and `msync` are refused, and a misaligned offset is accepted and maps something
//! else. So length and alignment come from sysfs, and ranges are checked before the kernel sees them.

use std::fs::OpenOptions;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carlsbad_types::ByteSize;

use super::opened::{Opened, answers, sayings};
use super::{
    Backend, Coherence, Geometry, Health, Identity, Persistence, attribute, boot_incarnation,
    number,
};
use crate::HostId;
use crate::error::{Error, Result};
use crate::layout::EXTENT;

/// A device that holds a pool.
#[derive(Debug)]
pub struct DevDax {
    opened: Opened,
    path: PathBuf,
    /// Its folder in sysfs.
    attributes: PathBuf,
}

impl DevDax {
    /// Opens a device such as `/dev/dax0.0`.
    ///
    /// # Errors
    /// Where it is not a device that can be mapped: it is system memory or has no driver, or its
    /// alignment is not 2 MiB or 4 KiB. The message says what would make it one.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        Self::open_in(path.into(), Path::new("/sys"))
    }

    /// As [`DevDax::open`], with another root of sysfs.
    pub(crate) fn open_in(path: PathBuf, sysfs: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let attributes = sysfs.join("bus/dax/devices").join(&name);
        usable(&place, &name, &attributes)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(Error::io("open", &*place))?;
        let metadata = file.metadata().map_err(Error::io("look at", &*place))?;
        if !metadata.file_type().is_char_device() {
            return Err(Error::BadGeometry {
                place,
                why: "it is not a character device".to_owned(),
                fix: "use `FileHdm` for a file".to_owned(),
            });
        }
        let region = attributes.canonicalize().unwrap_or(attributes.clone());
        let persistent = is_persistent(&region);
        let alignment = number(&attributes.join("align")).unwrap_or(EXTENT);
        Ok(Self {
            opened: Opened {
                geometry: Geometry {
                    length: ByteSize::new(number(&attributes.join("size")).unwrap_or(0)),
                    alignment: ByteSize::new(alignment),
                    persistence: if persistent {
                        Persistence::Power
                    } else {
                        Persistence::Volatile
                    },
                    coherence: Coherence::Hardware,
                    numa_node: attribute(&attributes.join("target_node"))
                        .and_then(|node| node.parse().ok()),
                    writable: true,
                },
                identity: Identity {
                    place,
                    serial: format!("{}:{}", metadata.rdev(), region.display()),
                    incarnation: if persistent { 0 } else { boot_incarnation() },
                },
                host: HostId::default(),
                file,
            },
            path,
            attributes,
        })
    }
}

/// Whether the device is one that programs can map, by what sysfs says of it.
pub(crate) fn usable(place: &str, name: &str, attributes: &Path) -> Result<()> {
    let bad = |why: String, fix: String| {
        Err(Error::BadGeometry {
            place: place.to_owned(),
            why,
            fix,
        })
    };
    if !attributes.exists() {
        return bad(
            "the kernel knows no such DAX device".to_owned(),
            "`directcxl scan` shows those there are".to_owned(),
        );
    }
    let driver = attributes.join("driver");
    let driver = std::fs::read_link(driver)
        .ok()
        .and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
    match driver.as_deref() {
        Some("device_dax") => {}
        Some("kmem") => {
            return bad(
                "it is system memory (driver kmem), which every process gets pieces of".to_owned(),
                format!("daxctl reconfigure-device --mode=devdax --force {name}"),
            );
        }
        Some(other) => {
            return bad(
                format!("its driver is {other}"),
                format!("echo {name} > /sys/bus/dax/drivers/{other}/unbind, then bind device_dax"),
            );
        }
        None => {
            return bad(
                "it has no driver".to_owned(),
                format!("echo {name} > /sys/bus/dax/drivers/device_dax/new_id"),
            );
        }
    }
    let size = number(&attributes.join("size")).unwrap_or(0);
    if size == 0 {
        return bad(
            "its size is 0".to_owned(),
            format!("daxctl reconfigure-device --size={} {name}", "2M"),
        );
    }
    match number(&attributes.join("align")).unwrap_or(EXTENT) {
        align if align > EXTENT || align == 0 || !EXTENT.is_multiple_of(align) => bad(
            format!("its alignment is {}", ByteSize::new(align)),
            format!("daxctl reconfigure-device --align=2M {name}"),
        ),
        _ => Ok(()),
    }
}

/// Whether the device lies on persistent memory, by its place among the devices.
fn is_persistent(region: &Path) -> bool {
    region.components().any(|part| {
        let part = part.as_os_str().to_string_lossy();
        part.starts_with("ndbus") || part.starts_with("pmem_region")
    })
}

sayings!(DevDax);

impl Backend for DevDax {
    answers!();

    fn health(&self) -> Health {
        match number(&self.attributes.join("size")) {
            Some(size) if size >= self.opened.geometry.length.get() => {}
            _ => return Health::Removed,
        }
        let poisoned = bad_ranges(&self.attributes);
        if poisoned.is_empty() {
            Health::Ok
        } else {
            Health::Poisoned(poisoned)
        }
    }

    fn reopen(&self) -> Result<Arc<dyn Backend>> {
        let mut again = Self::open(&self.path)?;
        again.opened.as_said_of(&self.opened);
        Ok(Arc::new(again))
    }
}

/// Bad ranges that the region lists (`badblocks`: first sector and number of sectors, of 512 bytes).
fn bad_ranges(attributes: &Path) -> Vec<Range<u64>> {
    let Some(region) = attributes.canonicalize().ok() else {
        return Vec::new();
    };
    let Some(text) = region
        .ancestors()
        .find_map(|folder| attribute(&folder.join("badblocks")))
    else {
        return Vec::new();
    };
    text.lines()
        .filter_map(|line| {
            let (first, count) = line.split_once(' ')?;
            let (first, count): (u64, u64) = (first.parse().ok()?, count.trim().parse().ok()?);
            Some(first.checked_mul(512)?..first.checked_add(count)?.checked_mul(512)?)
        })
        .collect()
}
