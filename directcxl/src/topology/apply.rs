//! Making a region by sysfs, and finding out why the kernel refuses.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::plan::{Mode, Plan, Write};
use super::scan::{driver, scan};
use crate::backend::attribute;
use crate::error::{Error, Result};

/// How long the kernel may take to make the DAX device of a region.
const PATIENCE: Duration = Duration::from_secs(5);

/// What came out of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The region.
    pub region: String,
    /// Its device, such as `/dev/dax0.0`. Nothing for persistent memory, on which
    /// `ndctl create-namespace -m devdax` makes one.
    pub device: Option<PathBuf>,
}

/// Makes the region of a plan, and binds `device_dax` to it, so that programs can map it. What was
/// made is taken back where a step fails.
///
/// # Errors
/// [`Error::Topology`] with the step that failed, why, and what to do.
pub fn apply(root: &Path, plan: &Plan) -> Result<Applied> {
    let word = plan.mode.word();
    let create = root
        .join("bus/cxl/devices")
        .join(&plan.root_decoder)
        .join(format!("create_{word}_region"));
    let region = attribute(&create)
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Error::Topology {
            step: format!("read the name of the next region from {}", create.display()),
            why: "the root decoder offers none".to_owned(),
            fix: format!("choose a window that takes {word} memory; be root"),
        })?;
    for (done, write) in plan.writes().iter().enumerate() {
        if let Err(why) = write_one(root, write, &region) {
            let explained = explain(root, plan, &region, write, &why);
            if done > 0 {
                take_back(root, &plan.root_decoder, &plan.decoders, &region);
            }
            return Err(explained);
        }
    }
    tracing::info!(region, size = plan.size.get(), "a region is there");
    let device = match plan.mode {
        Mode::Pmem => None,
        Mode::Volatile => Some(bind_device_dax(root, &region)?),
    };
    Ok(Applied { region, device })
}

/// Takes a region away: what it holds is lost, unless it is persistent.
///
/// # Errors
/// Where there is none of this name, or it is in use.
pub fn destroy(root: &Path, region: &str) -> Result<()> {
    let topology = scan(root)?;
    let Some(known) = topology.regions.iter().find(|r| r.name == region) else {
        return Err(Error::Topology {
            step: format!("destroy {region}"),
            why: "there is no such region".to_owned(),
            fix: "`directcxl scan` shows those there are".to_owned(),
        });
    };
    for dax in topology
        .dax
        .iter()
        .filter(|dax| dax.region.as_deref() == Some(region))
    {
        if let Some(driver) = &dax.driver {
            let unbind = Write {
                to: format!("bus/dax/drivers/{driver}/unbind"),
                value: dax.name.clone(),
                step: format!("unbind {}", dax.name),
            };
            write_one(root, &unbind, region).map_err(|why| Error::Topology {
                step: unbind.step.clone(),
                why: why.to_string(),
                fix: "close what has it open; memory that is in use as system memory can be \
                      unplugged only when it is offline"
                    .to_owned(),
            })?;
        }
    }
    let decoders: Vec<_> = topology
        .endpoint_decoders
        .iter()
        .filter(|decoder| decoder.region.as_deref() == Some(region))
        .map(|decoder| decoder.name.clone())
        .collect();
    let window = known.root_decoder.clone().unwrap_or_default();
    take_back(root, &window, &decoders, region);
    if root.join("bus/cxl/devices").join(region).exists() {
        return Err(Error::Topology {
            step: format!("destroy {region}"),
            why: "it is still there".to_owned(),
            fix: "be root, and close what has its device open".to_owned(),
        });
    }
    Ok(())
}

fn write_one(root: &Path, write: &Write, region: &str) -> io::Result<()> {
    let to = root.join(write.to.replace("{region}", region));
    // Never created: where the attribute is missing, the kernel does not offer it.
    let mut file = fs::OpenOptions::new().write(true).open(to)?;
    // In one piece, and with a line end, without which some attributes refuse it.
    let line = write.value.replace("{region}", region) + "\n";
    io::Write::write_all(&mut file, line.as_bytes())
}

/// Undoes as much as there is.
fn take_back(root: &Path, window: &str, decoders: &[String], region: &str) {
    let device = |name: &str, attribute: &str| format!("bus/cxl/devices/{name}/{attribute}");
    let mut writes = vec![
        (
            "bus/cxl/drivers/cxl_region/unbind".to_owned(),
            region.to_owned(),
        ),
        (device(region, "commit"), "0".to_owned()),
    ];
    for i in 0..decoders.len() {
        writes.push((device(region, &format!("target{i}")), String::new()));
    }
    writes.push((device(window, "delete_region"), region.to_owned()));
    for decoder in decoders {
        writes.push((device(decoder, "dpa_size"), "0".to_owned()));
    }
    for (to, value) in writes {
        let write = Write {
            to,
            value,
            step: String::new(),
        };
        if let Err(why) = write_one(root, &write, region) {
            tracing::debug!(to = write.to, %why, "not taken back");
        }
    }
}

/// The reason behind a refusal, by what the kernel's state shows.
fn explain(root: &Path, plan: &Plan, region: &str, write: &Write, why: &io::Error) -> Error {
    let code = why.raw_os_error().unwrap_or(0);
    let step = write.step.as_str();
    let (why, fix): (String, String) = match (step, code) {
        (_, libc::EACCES | libc::EPERM) => (
            format!("{why}"),
            "be root; where root is refused, the kernel is locked down".to_owned(),
        ),
        ("create the region", libc::EBUSY) => (
            "another program made a region at the same moment".to_owned(),
            "try again".to_owned(),
        ),
        ("set the number of devices" | "set the granularity", libc::EINVAL) => (
            format!("{} does not lead to the devices with {} ways of {}", plan.root_decoder, plan.ways(), plan.granularity),
            "use the window's own granularity, and a number of devices that its bridges can split".to_owned(),
        ),
        ("reserve device memory", libc::ENOSPC | libc::EBUSY) => (
            "the device has less free memory than the plan found, or an earlier decoder of it is not programmed yet".to_owned(),
            "scan and plan again; decoders of a device are programmed in order".to_owned(),
        ),
        ("reserve addresses", libc::ENOSPC | libc::ERANGE | libc::ENXIO) => (
            format!("{} has no room for {} in one piece", plan.root_decoder, plan.size),
            "destroy a region, or ask for less; CONFIG_CXL_REGION and enough free address space are needed".to_owned(),
        ),
        ("add a device to the region", libc::ENXIO) => (
            "the position is not the one that the hierarchy gives the device".to_owned(),
            "name the devices in another order: those below one bridge or switch belong together".to_owned(),
        ),
        ("add a device to the region", libc::EBUSY) => (
            "a port on the way has no free decoder".to_owned(),
            "destroy a region that goes through the same switch".to_owned(),
        ),
        ("program the decoders", libc::ENXIO) => (
            "not every position has a device, or a device is gone".to_owned(),
            "scan and plan again".to_owned(),
        ),
        ("program the decoders", libc::EINVAL | libc::ENOTTY) => (
            "the caches of the processors cannot be flushed, which the kernel wants before addresses \
             change their meaning: it does not trust a hypervisor with that"
                .to_owned(),
            "in a machine of QEMU use -cpu max,hypervisor=off; elsewhere load a kernel with CONFIG_CXL_REGION_INVALIDATION_TEST".to_owned(),
        ),
        ("bring the region up", libc::ENODEV) => (
            "the driver cxl_region does not take it".to_owned(),
            "load cxl_region (it is part of cxl_core) and, for volatile memory, dax_cxl".to_owned(),
        ),
        ("bring the region up", libc::EBUSY) if is_bound(root, region) => (
            "it is up already".to_owned(),
            "use it".to_owned(),
        ),
        (_, libc::ENOENT) => (
            format!("{} is not there", write.to.replace("{region}", region)),
            "the kernel is too old for it: volatile regions need 6.3 or later; load cxl_region".to_owned(),
        ),
        _ => (
            why.to_string(),
            "`dmesg | grep cxl` has the kernel's own words (more with dyndbg=+p on cxl_core)".to_owned(),
        ),
    };
    Error::Topology {
        step: format!(
            "{step} (write {:?} to {})",
            write.value.replace("{region}", region),
            write.to.replace("{region}", region)
        ),
        why,
        fix,
    }
}

fn is_bound(root: &Path, region: &str) -> bool {
    driver(&root.join("bus/cxl/devices").join(region)).is_some()
}

/// Waits for the region's DAX device, and gives it to `device_dax` if another driver has it.
fn bind_device_dax(root: &Path, region: &str) -> Result<PathBuf> {
    let start = Instant::now();
    let dax = loop {
        let found = scan(root)?
            .dax
            .into_iter()
            .find(|dax| dax.region.as_deref() == Some(region) && dax.size.get() > 0);
        if let Some(dax) = found {
            break dax;
        }
        if start.elapsed() > PATIENCE {
            return Err(Error::Topology {
                step: format!("find the device of {region}"),
                why: "the region has no DAX device".to_owned(),
                fix: "load dax_cxl (kernel 6.5 or later) and device_dax; then \
                      `directcxl scan` shows it"
                    .to_owned(),
            });
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let name = dax.name;
    let device = Path::new("/dev").join(&name);
    let failed = |step: &str, why: io::Error, fix: &str| Error::Topology {
        step: format!("{step} {name}"),
        why: why.to_string(),
        fix: fix.to_owned(),
    };
    let write = |to: String| Write {
        to,
        value: name.clone(),
        step: String::new(),
    };
    match dax.driver.as_deref() {
        Some("device_dax") => return Ok(device),
        Some(other) => {
            // The memory that kmem has made of it goes with the driver, if nothing of it is online.
            let unbind = write(format!("bus/dax/drivers/{other}/unbind"));
            write_one(root, &unbind, region).map_err(|why| {
                failed(
                    "take away the driver of",
                    why,
                    "it is system memory, and in use: daxctl reconfigure-device --mode=devdax --force",
                )
            })?;
        }
        None => {}
    }
    let bind = write("bus/dax/drivers/device_dax/new_id".to_owned());
    write_one(root, &bind, region).map_err(|why| {
        failed(
            "bind device_dax to",
            why,
            "load device_dax (modprobe device_dax)",
        )
    })?;
    Ok(device)
}
