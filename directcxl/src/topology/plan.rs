//! Which devices a region interleaves over, and how. Pure, but for the name that a new persistent set
//! gets: a topology in, a plan out.

use carlsbad_types::ByteSize;
use uuid::Uuid;

use super::scan::{EndpointDecoder, Memdev, RootDecoder, Topology};
use crate::error::{Error, Result};

/// Regions are multiples of it for each device (CXL 3.1, 8.2.4.20: HDM decoders count in 256 MiB).
const DECODER_UNIT: u64 = 256 << 20;
/// Granularities that a decoder can be programmed with (CXL 3.1, 8.2.4.20.7).
const GRANULARITIES: [u64; 7] = [256, 512, 1024, 2048, 4096, 8192, 16384];
/// Numbers of devices that a decoder can be programmed with (as above).
const WAYS: [u32; 8] = [1, 2, 3, 4, 6, 8, 12, 16];

/// Whether what a region holds survives a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// It does not.
    Volatile,
    /// It does.
    Pmem,
}

impl Mode {
    /// As sysfs spells it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Volatile => "ram",
            Self::Pmem => "pmem",
        }
    }
}

/// What kind of region is wanted. Nothing means: choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Volatile or persistent.
    pub mode: Mode,
    /// Memory devices, in the order of interleaving.
    pub memdevs: Vec<String>,
    /// How many devices, where they are not named.
    pub ways: Option<u32>,
    /// Bytes that go to one device before the next.
    pub granularity: Option<u64>,
    /// All of it; as much as the devices have, otherwise.
    pub size: Option<ByteSize>,
    /// The window.
    pub root_decoder: Option<String>,
    /// Of a persistent set that was made before: its content is found again by it.
    pub uuid: Option<Uuid>,
}

impl Request {
    /// The largest region of a mode.
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            memdevs: Vec::new(),
            ways: None,
            granularity: None,
            size: None,
            root_decoder: None,
            uuid: None,
        }
    }
}

/// How a region is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Volatile or persistent.
    pub mode: Mode,
    /// The window.
    pub root_decoder: String,
    /// Memory devices, in the order of interleaving.
    pub memdevs: Vec<String>,
    /// The decoder of each of them.
    pub decoders: Vec<String>,
    /// Bytes that go to one device before the next.
    pub granularity: u64,
    /// All of it.
    pub size: ByteSize,
    /// The name for life of a persistent set: keep it, to make the same region again.
    pub uuid: Option<Uuid>,
}

/// One value that is written to sysfs. `{region}` in a place or value stands for the region's name,
/// which the kernel chooses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Below the root of sysfs.
    pub to: String,
    /// What is written.
    pub value: String,
    /// What it does, as a verb.
    pub step: String,
}

impl Plan {
    /// Devices.
    pub fn ways(&self) -> usize {
        self.memdevs.len()
    }

    /// Everything that [`apply`](super::apply) writes, in order, after the region's name was read
    /// from the root decoder.
    pub fn writes(&self) -> Vec<Write> {
        let device = |name: &str, attribute: &str| format!("bus/cxl/devices/{name}/{attribute}");
        let mut writes = Vec::new();
        let mut write = |to: String, value: String, step: &str| {
            writes.push(Write {
                to,
                value,
                step: step.to_owned(),
            });
        };
        let word = self.mode.word();
        let create = format!("create_{word}_region");
        let region = "{region}";
        write(
            device(&self.root_decoder, &create),
            region.to_owned(),
            "create the region",
        );
        if let Some(uuid) = self.uuid {
            write(device(region, "uuid"), uuid.to_string(), "name the region");
        }
        write(
            device(region, "interleave_granularity"),
            self.granularity.to_string(),
            "set the granularity",
        );
        write(
            device(region, "interleave_ways"),
            self.ways().to_string(),
            "set the number of devices",
        );
        let share = self.size.get() / self.ways().max(1) as u64;
        for decoder in &self.decoders {
            write(
                device(decoder, "mode"),
                word.to_owned(),
                "set the mode of a decoder",
            );
            write(
                device(decoder, "dpa_size"),
                format!("{share:#x}"),
                "reserve device memory",
            );
        }
        write(
            device(region, "size"),
            format!("{:#x}", self.size.get()),
            "reserve addresses",
        );
        for (i, decoder) in self.decoders.iter().enumerate() {
            write(
                device(region, &format!("target{i}")),
                decoder.clone(),
                "add a device to the region",
            );
        }
        write(
            device(region, "commit"),
            "1".to_owned(),
            "program the decoders",
        );
        write(
            "bus/cxl/drivers/cxl_region/bind".to_owned(),
            region.to_owned(),
            "bring the region up",
        );
        writes
    }
}

fn no(why: impl Into<String>, fix: impl Into<String>) -> Error {
    Error::Topology {
        step: "plan a region".to_owned(),
        why: why.into(),
        fix: fix.into(),
    }
}

/// Plans a region.
///
/// # Errors
/// [`Error::Topology`] with what stands against it, and what would help.
pub fn plan(topology: &Topology, request: &Request) -> Result<Plan> {
    if topology.root_decoders.is_empty() {
        return Err(no(
            "there is no CXL window",
            "load cxl_acpi (modprobe cxl_acpi cxl_pci cxl_mem cxl_port); in the firmware's set-up, \
             enable CXL memory; in QEMU, -M q35,cxl=on with cxl-fmw.0.targets.0 and a size",
        ));
    }
    let memdevs = choose_memdevs(topology, request)?;
    let ways = memdevs.len() as u32;
    if !WAYS.contains(&ways) {
        return Err(no(
            format!("{ways} devices cannot be interleaved"),
            "use 1, 2, 3, 4, 6, 8, 12 or 16",
        ));
    }
    let window = choose_window(topology, request)?;
    let granularity = granularity(window, request, ways)?;
    let mut decoders = Vec::new();
    let mut share = u64::MAX;
    for memdev in &memdevs {
        let (decoder, free) = free_decoder(topology, memdev, request.mode)?;
        decoders.push(decoder.name.clone());
        share = share.min(free);
    }
    let size = size(topology, window, request, &memdevs, share)?;
    Ok(Plan {
        mode: request.mode,
        root_decoder: window.name.clone(),
        memdevs: memdevs.iter().map(|memdev| memdev.name.clone()).collect(),
        decoders,
        granularity,
        size,
        uuid: match request.mode {
            Mode::Volatile => None,
            Mode::Pmem => Some(request.uuid.unwrap_or_else(Uuid::new_v4)),
        },
    })
}

fn capacity(memdev: &Memdev, mode: Mode) -> u64 {
    match mode {
        Mode::Volatile => memdev.ram.get(),
        Mode::Pmem => memdev.pmem.get(),
    }
}

fn choose_memdevs<'a>(topology: &'a Topology, request: &Request) -> Result<Vec<&'a Memdev>> {
    if !request.memdevs.is_empty() {
        if let Some(ways) = request.ways
            && ways as usize != request.memdevs.len()
        {
            return Err(no(
                format!(
                    "{} devices are named, and {ways} wanted",
                    request.memdevs.len()
                ),
                "leave one of the two out",
            ));
        }
        let mut chosen: Vec<&Memdev> = Vec::new();
        for name in &request.memdevs {
            if chosen.iter().any(|memdev| memdev.name == *name) {
                return Err(no(
                    format!("{name} is named twice"),
                    "name each device once",
                ));
            }
            let Some(memdev) = topology.memdevs.iter().find(|memdev| memdev.name == *name) else {
                let there: Vec<_> = topology.memdevs.iter().map(|m| m.name.as_str()).collect();
                return Err(no(
                    format!("there is no {name}"),
                    format!("name one of: {}", there.join(", ")),
                ));
            };
            if capacity(memdev, request.mode) == 0 {
                return Err(no(
                    format!("{name} has no {} memory", request.mode.word()),
                    "plan the other mode, or set the device's partition (cxl set-partition)",
                ));
            }
            chosen.push(memdev);
        }
        return Ok(chosen);
    }
    let able: Vec<_> = topology
        .memdevs
        .iter()
        .filter(|memdev| capacity(memdev, request.mode) > 0)
        .filter(|memdev| {
            request.ways.is_none() || free_decoder(topology, memdev, request.mode).is_ok()
        })
        .collect();
    if able.is_empty() {
        return Err(no(
            format!("no device has {} memory", request.mode.word()),
            "load cxl_pci and cxl_mem; `directcxl scan` shows what there is",
        ));
    }
    let ways = match request.ways {
        Some(ways) => ways,
        // As many as can be interleaved.
        None => WAYS
            .into_iter()
            .rev()
            .find(|ways| *ways as usize <= able.len())
            .unwrap_or(1),
    };
    if ways as usize > able.len() {
        return Err(no(
            format!("{ways} devices are wanted, and {} are free", able.len()),
            "destroy a region that uses the others, or ask for fewer",
        ));
    }
    Ok(able.into_iter().take(ways as usize).collect())
}

fn choose_window<'a>(topology: &'a Topology, request: &Request) -> Result<&'a RootDecoder> {
    let takes = |window: &RootDecoder| match request.mode {
        Mode::Volatile => window.volatile,
        Mode::Pmem => window.pmem,
    };
    if let Some(name) = &request.root_decoder {
        let Some(window) = topology.root_decoders.iter().find(|w| w.name == *name) else {
            let there: Vec<_> = topology
                .root_decoders
                .iter()
                .map(|w| w.name.as_str())
                .collect();
            return Err(no(
                format!("there is no root decoder {name}"),
                format!("name one of: {}", there.join(", ")),
            ));
        };
        if !takes(window) {
            return Err(no(
                format!("{name} does not take {} memory", request.mode.word()),
                "the firmware decides that (CFMWS restrictions): choose another window or mode",
            ));
        }
        return Ok(window);
    }
    topology
        .root_decoders
        .iter()
        .filter(|window| takes(window) && !window.locked)
        .max_by_key(|window| free_in(topology, window))
        .ok_or_else(|| {
            no(
                format!("no window takes {} memory", request.mode.word()),
                "the firmware decides that (CFMWS restrictions): plan the other mode",
            )
        })
}

fn granularity(window: &RootDecoder, request: &Request, ways: u32) -> Result<u64> {
    let wanted = request.granularity.unwrap_or(window.granularity.max(256));
    if !GRANULARITIES.contains(&wanted) {
        return Err(no(
            format!("{wanted} is no granularity"),
            "use 256, 512, 1024, 2048, 4096, 8192 or 16384",
        ));
    }
    if window.ways > 1 && wanted != window.granularity {
        return Err(no(
            format!(
                "{} interleaves over {} bridges with {}",
                window.name, window.ways, window.granularity
            ),
            format!("use --granularity {}", window.granularity),
        ));
    }
    if window.ways > 0 && !ways.is_multiple_of(window.ways) {
        return Err(no(
            format!(
                "{} leads to {} bridges, and {ways} devices are planned",
                window.name, window.ways
            ),
            "use a multiple of the number of bridges",
        ));
    }
    Ok(wanted)
}

/// A decoder of a device that carries nothing, and the device's free memory.
fn free_decoder<'a>(
    topology: &'a Topology,
    memdev: &Memdev,
    mode: Mode,
) -> Result<(&'a EndpointDecoder, u64)> {
    let name = &memdev.name;
    let Some(endpoint) = &memdev.endpoint else {
        return Err(no(
            format!("{name} has no endpoint port: no driver leads from the host bridge to it"),
            "load cxl_port and cxl_mem; in QEMU give the host bridge two root ports, since with one \
             the kernel finds no decoder there",
        ));
    };
    let own = || {
        let all = topology.endpoint_decoders.iter();
        all.filter(|decoder| decoder.endpoint == *endpoint)
    };
    let used: u64 = own()
        .filter(|decoder| decoder.mode == mode.word())
        .map(|decoder| decoder.dpa_size.get())
        .sum();
    let free = capacity(memdev, mode).saturating_sub(used);
    let decoder = own().find(|decoder| decoder.region.is_none() && decoder.dpa_size.get() == 0);
    match decoder {
        Some(decoder) if free > 0 => Ok((decoder, free)),
        _ => {
            let regions: Vec<_> = own().filter_map(|d| d.region.as_deref()).collect();
            let holds = if regions.is_empty() {
                "decoders that were left half programmed".to_owned()
            } else {
                regions.join(", ")
            };
            Err(no(
                format!("{name} is in use by {holds}"),
                "destroy what uses it (`directcxl apply --destroy REGION`), or name another device",
            ))
        }
    }
}

fn free_in(topology: &Topology, window: &RootDecoder) -> u64 {
    let used: u64 = topology
        .regions
        .iter()
        .filter(|region| region.root_decoder.as_deref() == Some(&window.name))
        .map(|region| region.size.get())
        .sum();
    window.size.get().saturating_sub(used)
}

fn size(
    topology: &Topology,
    window: &RootDecoder,
    request: &Request,
    memdevs: &[&Memdev],
    share: u64,
) -> Result<ByteSize> {
    let ways = memdevs.len() as u64;
    let unit = DECODER_UNIT.saturating_mul(ways);
    let most = (share / DECODER_UNIT).saturating_mul(unit);
    let room = free_in(topology, window);
    let size = match request.size {
        None => most.min(room / unit * unit),
        Some(size) => size.get(),
    };
    if size == 0 && most == 0 {
        return Err(no(
            format!("a device has {} free", ByteSize::new(share)),
            format!(
                "a region takes a multiple of {} of each",
                ByteSize::new(DECODER_UNIT)
            ),
        ));
    }
    if size == 0 || size % unit != 0 {
        return Err(no(
            format!(
                "{} is no size of a region over {ways} devices",
                ByteSize::new(size)
            ),
            format!("use a multiple of {}", ByteSize::new(unit)),
        ));
    }
    if size > most {
        return Err(no(
            format!(
                "{} are wanted, and the devices have {} free",
                ByteSize::new(size),
                ByteSize::new(most)
            ),
            "ask for less, or for more devices",
        ));
    }
    if size > room {
        return Err(no(
            format!(
                "{} are wanted, and {} has addresses for {}",
                ByteSize::new(size),
                window.name,
                ByteSize::new(room)
            ),
            "ask for less; the size of the window is the firmware's (in QEMU, cxl-fmw.0.size)",
        ));
    }
    Ok(ByteSize::new(size))
}
