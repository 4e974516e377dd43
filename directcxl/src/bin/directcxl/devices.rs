//! Commands on devices and regions.

use directcxl::topology::{self, Mode, Plan, Request, Topology};
use serde_json::{Value, json};

use crate::options::{self, Global};
use crate::output;

pub(crate) fn show(global: &Global) -> anyhow::Result<()> {
    let topology = topology::scan(&global.sysfs)?;
    if global.json {
        return output::json(&describe(&topology));
    }
    output::table(
        [
            "device", "serial", "ram", "pmem", "numa", "endpoint", "path",
        ],
        &topology
            .memdevs
            .iter()
            .map(|memdev| {
                [
                    memdev.name.clone(),
                    format!("{:#x}", memdev.serial),
                    memdev.ram.to_string(),
                    memdev.pmem.to_string(),
                    or_none(memdev.numa_node),
                    memdev.endpoint.clone().unwrap_or_else(|| "none".to_owned()),
                    memdev.path.join(" > "),
                ]
            })
            .collect::<Vec<_>>(),
    )?;
    output::table(
        ["window", "start", "size", "ways", "granularity", "takes"],
        &topology
            .root_decoders
            .iter()
            .map(|window| {
                let takes = [(window.volatile, "ram"), (window.pmem, "pmem")];
                [
                    window.name.clone(),
                    format!("{:#x}", window.start),
                    window.size.to_string(),
                    window.ways.to_string(),
                    window.granularity.to_string(),
                    takes
                        .iter()
                        .filter(|(takes, _)| *takes)
                        .map(|(_, word)| *word)
                        .collect::<Vec<_>>()
                        .join(" "),
                ]
            })
            .collect::<Vec<_>>(),
    )?;
    output::table(
        ["region", "window", "size", "ways", "granularity", "state"],
        &topology
            .regions
            .iter()
            .map(|region| {
                [
                    region.name.clone(),
                    region.root_decoder.clone().unwrap_or_default(),
                    region.size.to_string(),
                    region.ways.to_string(),
                    region.granularity.to_string(),
                    match (region.committed, &region.driver) {
                        (_, Some(_)) => "up".to_owned(),
                        (true, None) => "programmed, without a driver".to_owned(),
                        (false, None) => "not programmed".to_owned(),
                    },
                ]
            })
            .collect::<Vec<_>>(),
    )?;
    output::table(
        ["dax", "size", "align", "driver", "region", "usable"],
        &topology
            .dax
            .iter()
            .map(|dax| {
                [
                    dax.name.clone(),
                    dax.size.to_string(),
                    dax.align.to_string(),
                    dax.driver.clone().unwrap_or_else(|| "none".to_owned()),
                    dax.region.clone().unwrap_or_default(),
                    match dax.usable(&topology) {
                        Ok(()) => format!("yes: directcxl format /dev/{}", dax.name),
                        Err(why) => format!("no: {why}"),
                    },
                ]
            })
            .collect::<Vec<_>>(),
    )?;
    if topology.memdevs.is_empty() && topology.root_decoders.is_empty() {
        output::line("This machine shows no CXL memory. A pool works on a file as well:")?;
        output::line("    directcxl format /dev/shm/pool --size 1G")?;
    }
    Ok(())
}

fn or_none(number: Option<u32>) -> String {
    number.map_or_else(|| "none".to_owned(), |number| number.to_string())
}

fn describe(topology: &Topology) -> Value {
    json!({
        "memdevs": topology.memdevs.iter().map(|memdev| json!({
            "name": memdev.name, "serial": memdev.serial, "ram": memdev.ram.get(),
            "pmem": memdev.pmem.get(), "numa_node": memdev.numa_node,
            "endpoint": memdev.endpoint, "path": memdev.path,
        })).collect::<Vec<_>>(),
        "root_decoders": topology.root_decoders.iter().map(|window| json!({
            "name": window.name, "start": window.start, "size": window.size.get(),
            "ways": window.ways, "granularity": window.granularity, "targets": window.targets,
            "ram": window.volatile, "pmem": window.pmem, "locked": window.locked,
        })).collect::<Vec<_>>(),
        "regions": topology.regions.iter().map(|region| json!({
            "name": region.name, "root_decoder": region.root_decoder, "size": region.size.get(),
            "ways": region.ways, "granularity": region.granularity,
            "committed": region.committed, "driver": region.driver,
        })).collect::<Vec<_>>(),
        "dax": topology.dax.iter().map(|dax| json!({
            "name": dax.name, "size": dax.size.get(), "align": dax.align.get(),
            "driver": dax.driver, "target_node": dax.target_node, "region": dax.region,
            "problem": dax.usable(topology).err().map(|why| why.to_string()),
        })).collect::<Vec<_>>(),
    })
}

fn make_plan(global: &Global, request: &options::Request) -> anyhow::Result<Plan> {
    let topology = topology::scan(&global.sysfs)?;
    let mode = match request.mode {
        options::Mode::Ram => Mode::Volatile,
        options::Mode::Pmem => Mode::Pmem,
    };
    Ok(topology::plan(
        &topology,
        &Request {
            mode,
            memdevs: request.memdevs.clone(),
            ways: request.ways,
            granularity: request.granularity,
            size: request.size,
            root_decoder: request.window.clone(),
            uuid: request.uuid,
        },
    )?)
}

pub(crate) fn plan(global: &Global, request: &options::Request) -> anyhow::Result<()> {
    let plan = make_plan(global, request)?;
    if global.json {
        return output::json(&json!({
            "mode": plan.mode.word(), "root_decoder": plan.root_decoder, "memdevs": plan.memdevs,
            "decoders": plan.decoders, "granularity": plan.granularity, "size": plan.size.get(),
            "writes": plan.writes().iter().map(|write| json!({
                "to": write.to, "value": write.value, "step": write.step,
            })).collect::<Vec<_>>(),
        }));
    }
    output::line(format!(
        "{} of {} memory in {}, over {} with {} bytes each in turn",
        plan.size,
        plan.mode.word(),
        plan.root_decoder,
        plan.memdevs.join(", "),
        plan.granularity
    ))?;
    for write in plan.writes() {
        let root = global.sysfs.display();
        output::line(format!("echo {} > {root}/{}", write.value, write.to))?;
    }
    Ok(())
}

pub(crate) fn apply(global: &Global, request: &options::Request) -> anyhow::Result<()> {
    let plan = make_plan(global, request)?;
    let applied = topology::apply(&global.sysfs, &plan)?;
    if global.json {
        return output::json(&json!({
            "region": applied.region, "device": applied.device, "size": plan.size.get(),
            "uuid": plan.uuid.map(|uuid| uuid.to_string()),
        }));
    }
    match applied.device {
        Some(device) => output::line(format!(
            "{} of {} is up: directcxl format {}",
            applied.region,
            plan.size,
            device.display()
        )),
        None => output::line(format!(
            "{} of {} is up: ndctl create-namespace -m devdax; after a restart, apply with --uuid {}",
            applied.region,
            plan.size,
            plan.uuid.unwrap_or_default()
        )),
    }
}

pub(crate) fn destroy(global: &Global, region: &str) -> anyhow::Result<()> {
    topology::destroy(&global.sysfs, region)?;
    if global.json {
        return output::json(&json!({ "destroyed": region }));
    }
    output::line(format!("{region} is gone"))
}
