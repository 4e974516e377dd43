//! What the kernel knows of CXL and DAX devices.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use carlsbad_types::ByteSize;

use crate::backend::{attribute, number};
use crate::error::{Error, Result};

/// CXL and DAX devices of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Topology {
    /// The root of sysfs that was read.
    pub root: PathBuf,
    /// Windows of the host's address space (CFMWS), each with a root decoder.
    pub root_decoders: Vec<RootDecoder>,
    /// Memory devices.
    pub memdevs: Vec<Memdev>,
    /// Decoders of memory devices, each of which can carry a part of one region.
    pub endpoint_decoders: Vec<EndpointDecoder>,
    /// Regions there are.
    pub regions: Vec<Region>,
    /// DAX devices there are.
    pub dax: Vec<DaxDevice>,
}

/// A window of the host's address space that decodes to CXL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDecoder {
    /// `decoder0.0`.
    pub name: String,
    /// Where the window is.
    pub start: u64,
    /// How large it is.
    pub size: ByteSize,
    /// Bytes that go to one target before the next.
    pub granularity: u64,
    /// Host bridges that it interleaves over.
    pub ways: u32,
    /// Devices or bridges it leads to: ports' device ids, by position.
    pub targets: Vec<u64>,
    /// Whether volatile memory may be mapped there.
    pub volatile: bool,
    /// Whether persistent memory may be mapped there.
    pub pmem: bool,
    /// Whether it is locked against regions.
    pub locked: bool,
}

/// A memory device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memdev {
    /// `mem0`.
    pub name: String,
    /// Its serial number.
    pub serial: u64,
    /// Its volatile memory.
    pub ram: ByteSize,
    /// Its persistent memory.
    pub pmem: ByteSize,
    /// The NUMA node of its host bridge.
    pub numa_node: Option<u32>,
    /// Its endpoint port, `endpoint2`; nothing where no driver has it.
    pub endpoint: Option<String>,
    /// Devices from the host bridge down to it: what of the hierarchy leads there.
    pub path: Vec<String>,
}

/// A decoder of a memory device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointDecoder {
    /// `decoder2.0`.
    pub name: String,
    /// The port it belongs to, `endpoint2`.
    pub endpoint: String,
    /// The region it carries a part of.
    pub region: Option<String>,
    /// `ram`, `pmem`, `none`.
    pub mode: String,
    /// Device memory that it has.
    pub dpa_size: ByteSize,
}

/// A region: an interleave set in a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// `region0`.
    pub name: String,
    /// The root decoder it was made under.
    pub root_decoder: Option<String>,
    /// Its bytes.
    pub size: ByteSize,
    /// Devices it interleaves over.
    pub ways: u32,
    /// Bytes that go to one device before the next.
    pub granularity: u64,
    /// Whether the decoders are programmed.
    pub committed: bool,
    /// The driver that is bound to it.
    pub driver: Option<String>,
}

/// A DAX device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaxDevice {
    /// `dax0.0`.
    pub name: String,
    /// Its bytes.
    pub size: ByteSize,
    /// Mappings begin and end at multiples of it.
    pub align: ByteSize,
    /// `device_dax` where programs can map it, `kmem` where it is system memory.
    pub driver: Option<String>,
    /// The NUMA node that it would be, or is.
    pub target_node: Option<u32>,
    /// The region it lies in.
    pub region: Option<String>,
}

impl DaxDevice {
    /// Why programs cannot map it, and what to do; nothing where they can.
    ///
    /// # Errors
    /// [`Error::BadGeometry`] with the reason.
    pub fn usable(&self, topology: &Topology) -> Result<()> {
        let attributes = topology.root.join("bus/dax/devices").join(&self.name);
        crate::backend::usable(&format!("/dev/{}", self.name), &self.name, &attributes)
    }
}

/// Reads `root/bus/cxl` and `root/bus/dax`; `root` is `/sys`, or a copy of it. A machine without
/// either has an empty topology.
///
/// # Errors
/// Where a folder is there and cannot be listed.
pub fn scan(root: &Path) -> Result<Topology> {
    let mut topology = Topology {
        root: root.to_owned(),
        ..Topology::default()
    };
    let devices = root.join("bus/cxl/devices");
    for name in names(&devices)? {
        let at = devices.join(&name);
        if let Some(decoder) = name.strip_prefix("decoder") {
            let port = decoder.split('.').next().unwrap_or_default();
            let is_root = exists(&at, "create_ram_region") || exists(&at, "create_pmem_region");
            if is_root || port == "0" {
                topology.root_decoders.push(root_decoder(name, &at));
            } else if exists(&at, "dpa_size") {
                topology.endpoint_decoders.push(endpoint_decoder(name, &at));
            }
        } else if name.strip_prefix("mem").is_some_and(is_number) {
            topology.memdevs.push(memdev(name, &at));
        } else if name.strip_prefix("region").is_some_and(is_number) {
            topology.regions.push(region(name, &at));
        }
    }
    let endpoints = endpoints(&devices)?;
    for memdev in &mut topology.memdevs {
        memdev.endpoint = endpoints.get(&memdev.name).cloned();
    }
    let devices = root.join("bus/dax/devices");
    for name in names(&devices)? {
        let at = devices.join(&name);
        topology.dax.push(dax_device(name, &at));
    }
    Ok(topology)
}

fn root_decoder(name: String, at: &Path) -> RootDecoder {
    let flag = |name| number(&at.join(name)) == Some(1);
    RootDecoder {
        start: number(&at.join("start")).unwrap_or(0),
        size: ByteSize::new(number(&at.join("size")).unwrap_or(0)),
        granularity: number(&at.join("interleave_granularity")).unwrap_or(0),
        ways: ways(at),
        targets: attribute(&at.join("target_list"))
            .unwrap_or_default()
            .split(',')
            .filter_map(|target| target.trim().parse().ok())
            .collect(),
        volatile: flag("cap_ram"),
        pmem: flag("cap_pmem"),
        locked: flag("locked"),
        name,
    }
}

fn endpoint_decoder(name: String, at: &Path) -> EndpointDecoder {
    let parent = at.canonicalize().unwrap_or_default();
    let text = |name| attribute(&at.join(name));
    EndpointDecoder {
        endpoint: ancestor(&parent, "endpoint").unwrap_or_default(),
        region: text("region").filter(|region| !region.is_empty()),
        mode: text("mode").unwrap_or_default(),
        dpa_size: ByteSize::new(number(&at.join("dpa_size")).unwrap_or(0)),
        name,
    }
}

fn memdev(name: String, at: &Path) -> Memdev {
    let size = |name| ByteSize::new(number(&at.join(name)).unwrap_or(0));
    let real = at.canonicalize().unwrap_or_default();
    Memdev {
        serial: number(&at.join("serial")).unwrap_or(0),
        ram: size("ram/size"),
        pmem: size("pmem/size"),
        numa_node: attribute(&at.join("numa_node")).and_then(|node| node.parse().ok()),
        endpoint: None,
        path: real
            .components()
            .map(|part| part.as_os_str().to_string_lossy().into_owned())
            .filter(|part| part.starts_with("pci") || part.matches(':').count() == 2)
            .collect(),
        name,
    }
}

fn region(name: String, at: &Path) -> Region {
    let real = at.canonicalize().unwrap_or_default();
    Region {
        root_decoder: ancestor(&real, "decoder"),
        size: ByteSize::new(number(&at.join("size")).unwrap_or(0)),
        ways: ways(at),
        granularity: number(&at.join("interleave_granularity")).unwrap_or(0),
        committed: number(&at.join("commit")) == Some(1),
        driver: driver(at),
        name,
    }
}

fn dax_device(name: String, at: &Path) -> DaxDevice {
    let real = at.canonicalize().unwrap_or_default();
    DaxDevice {
        size: ByteSize::new(number(&at.join("size")).unwrap_or(0)),
        align: ByteSize::new(number(&at.join("align")).unwrap_or(0)),
        driver: driver(at),
        target_node: attribute(&at.join("target_node")).and_then(|node| node.parse().ok()),
        region: ancestor(&real, "region"),
        name,
    }
}

/// Which memory device an endpoint port belongs to: its `uport` is a link to the device.
fn endpoints(devices: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for name in names(devices)? {
        if name.strip_prefix("endpoint").is_some_and(is_number)
            && let Ok(link) = fs::read_link(devices.join(&name).join("uport"))
            && let Some(memdev) = link.file_name()
        {
            found.insert(memdev.to_string_lossy().into_owned(), name);
        }
    }
    Ok(found)
}

fn ways(at: &Path) -> u32 {
    number(&at.join("interleave_ways"))
        .and_then(|ways| ways.try_into().ok())
        .unwrap_or(0)
}

/// The name of the driver that is bound to a device.
pub(super) fn driver(at: &Path) -> Option<String> {
    let link = fs::read_link(at.join("driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// The innermost folder above a device, or the device itself, whose name is `prefix` and a number.
fn ancestor(real: &Path, prefix: &str) -> Option<String> {
    real.ancestors()
        .skip(1)
        .filter_map(|folder| Some(folder.file_name()?.to_string_lossy().into_owned()))
        .find(|name| {
            name.strip_prefix(prefix)
                .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
        })
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn exists(at: &Path, name: &str) -> bool {
    at.join(name).exists()
}

/// Names in a folder, sorted as a person would: `mem2` before `mem10`. None where there is no folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(why) => return Err(Error::io("list", folder.display().to_string())(why)),
    };
    let mut names: Vec<_> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_by_key(|name| {
        let digits = name
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(name.len());
        let (word, rest) = name.split_at(digits);
        let numbers: Vec<u64> = rest
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|part| part.parse().ok())
            .collect();
        (word.to_owned(), numbers)
    });
    Ok(names)
}
