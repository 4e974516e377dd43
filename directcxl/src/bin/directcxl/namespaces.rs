//! Commands on pools and namespaces.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use carlsbad_types::ByteSize;
use directcxl::backend::{Backend, Coherence};
use directcxl::{
    DevDax, Epoch, Error, FileHdm, FormatOptions, HostId, NamespaceOptions, Pool, Problem, Role,
};
use serde_json::json;

use crate::options::{Create, Format, Global};
use crate::output;

fn coherence(global: &Global) -> Coherence {
    if global.software_coherence {
        Coherence::Software
    } else {
        Coherence::Hardware
    }
}

fn is_device(place: &Path) -> bool {
    match place.metadata() {
        Ok(found) => found.file_type().is_char_device(),
        // What is not there is said not to be by whoever would have it.
        Err(_) => place.starts_with("/dev/") && !place.starts_with("/dev/shm"),
    }
}

fn backend(global: &Global, place: &Path, write: bool) -> anyhow::Result<Arc<dyn Backend>> {
    let host = HostId(global.host);
    let coherence = coherence(global);
    if is_device(place) {
        let device = DevDax::open(place)?;
        return Ok(Arc::new(device.on_host(host).coherence(coherence)));
    }
    let file = if write {
        FileHdm::open(place)?
    } else {
        FileHdm::open_read_only(place)?
    };
    Ok(Arc::new(file.on_host(host).coherence(coherence)))
}

fn open(global: &Global, place: &Path, write: bool) -> anyhow::Result<Pool> {
    let backend = backend(global, place, write)?;
    let role = if write {
        Role::Writer(global.epoch.map_or(Epoch::CURRENT, Epoch))
    } else {
        Role::Reader
    };
    Ok(Pool::open_shared(backend, role)?)
}

pub(crate) fn format(global: &Global, format: &Format) -> anyhow::Result<()> {
    let defaults = FormatOptions::default();
    let options = FormatOptions {
        hosts: format.hosts,
        entries: format.entries.unwrap_or(defaults.entries),
        overwrite: format.force,
    };
    let made = match format.size {
        Some(size) if !format.place.exists() => {
            let file = FileHdm::create(&format.place, size)?;
            Some(
                file.on_host(HostId(global.host))
                    .coherence(coherence(global)),
            )
        }
        Some(size) if !is_device(&format.place) => {
            // Whoever asks for a size has not seen that there is something.
            let length = format.place.metadata().map_or(0, |found| found.len());
            if size.round_up(ByteSize::mib(2)) != Some(ByteSize::new(length)) {
                return Err(Error::BadGeometry {
                    place: format.place.display().to_string(),
                    why: format!("it is there already, of {}", ByteSize::new(length)),
                    fix: "leave out --size, or take it away first".to_owned(),
                }
                .into());
            }
            None
        }
        None if !format.place.exists() && !is_device(&format.place) => {
            return Err(Error::BadGeometry {
                place: format.place.display().to_string(),
                why: "there is no such file".to_owned(),
                fix: "say how large it is to be: --size 1G".to_owned(),
            }
            .into());
        }
        _ => None,
    };
    let is_new = made.is_some();
    let pool = match made {
        Some(file) => Pool::format(file, options),
        None => Pool::format_shared(backend(global, &format.place, true)?, options),
    };
    if pool.is_err() && is_new {
        // Nobody has seen it: it was made above.
        let _already_gone = std::fs::remove_file(&format.place);
    }
    let info = pool?.info()?;
    if global.json {
        return output::json(&json!({
            "uuid": info.uuid.to_string(), "length": info.length.get(), "free": info.free.get(),
            "hosts": info.hosts, "most_namespaces": info.most_namespaces,
        }));
    }
    output::line(format!(
        "pool {} of {}, {} free",
        info.uuid, info.length, info.free
    ))
}

pub(crate) fn create(global: &Global, create: &Create) -> anyhow::Result<()> {
    let pool = open(global, &create.place, true)?;
    let namespace = pool.create(&create.name, create.size, NamespaceOptions::default())?;
    let handle = namespace.handle();
    if global.json {
        return output::json(&json!({
            "name": create.name, "generation": handle.generation, "offset": handle.offset,
            "length": handle.length,
        }));
    }
    output::line(format!(
        "{} of {} at {:#x}",
        create.name,
        namespace.length(),
        handle.offset
    ))
}

pub(crate) fn list(global: &Global, place: &Path) -> anyhow::Result<()> {
    let pool = open(global, place, false)?;
    let (all, info) = (pool.list()?, pool.info()?);
    if global.json {
        return output::json(&json!({
            "uuid": info.uuid.to_string(), "length": info.length.get(), "free": info.free.get(),
            "largest_free": info.largest_free.get(), "quarantined": info.quarantined.get(),
            "epoch": info.epoch.0, "writer": info.writer.0, "hosts": info.hosts,
            "namespaces": all.iter().map(|one| json!({
                "name": one.name, "generation": one.generation, "offset": one.offset,
                "length": one.length.get(),
            })).collect::<Vec<_>>(),
        }));
    }
    output::table(
        ["name", "size", "offset", "generation"],
        &all.iter()
            .map(|one| {
                [
                    one.name.clone(),
                    one.length.to_string(),
                    format!("{:#x}", one.offset),
                    one.generation.to_string(),
                ]
            })
            .collect::<Vec<_>>(),
    )?;
    output::line(format!(
        "{} free of {}, {} in one piece, {} in quarantine; {} writes with epoch {}",
        info.free, info.length, info.largest_free, info.quarantined, info.writer, info.epoch
    ))
}

pub(crate) fn check(global: &Global, place: &Path, repair: bool) -> anyhow::Result<ExitCode> {
    // Opening for writing mends: a check that is to change nothing only reads.
    let before = match open(global, place, false) {
        Ok(pool) => pool.check(),
        Err(why) if matches!(why.downcast_ref(), Some(Error::Corrupt { .. })) => {
            return salvage(global, place, why);
        }
        Err(why) => return Err(why),
    };
    let report = if repair {
        open(global, place, true)?.repair()?;
        open(global, place, false)?.check()
    } else {
        before.clone()
    };
    let mended = before.problems.len().saturating_sub(report.problems.len());
    if global.json {
        output::json(&json!({
            "ok": report.is_ok(), "entries": report.entries, "namespaces": report.namespaces,
            "leases": report.leases, "mended": mended,
            "problems": report.problems.iter().map(|problem| json!({
                "what": problem.to_string(), "can_be_mended": problem.can_be_mended(),
            })).collect::<Vec<_>>(),
        }))?;
    } else {
        for problem in &report.problems {
            output::line(problem.to_string())?;
        }
        output::line(format!(
            "{} namespaces in {} entries; {} problems, {mended} mended",
            report.namespaces,
            report.entries,
            report.problems.len()
        ))?;
        if report.problems.iter().any(Problem::can_be_mended) && !repair {
            output::line("Some can be mended: --repair")?;
        }
    }
    Ok(if report.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(7)
    })
}

/// Lists what can be read of a pool that cannot be opened, and which nothing mends.
fn salvage(global: &Global, place: &Path, why: anyhow::Error) -> anyhow::Result<ExitCode> {
    let Ok(left) = Pool::salvage(backend(global, place, false)?) else {
        return Err(why);
    };
    if global.json {
        output::json(&json!({
            "ok": false, "error": why.to_string(), "entries": left.entries, "mended": 0,
            "problems": left.problems.iter().map(|problem| json!({
                "what": problem.to_string(), "can_be_mended": problem.can_be_mended(),
            })).collect::<Vec<_>>(),
            "salvage": left.namespaces.iter().map(|one| json!({
                "name": one.info.name, "generation": one.info.generation,
                "offset": one.info.offset, "length": one.info.length.get(),
                "certain": one.certain,
            })).collect::<Vec<_>>(),
        }))?;
        return Ok(ExitCode::from(7));
    }
    for problem in &left.problems {
        output::line(problem.to_string())?;
    }
    output::line("--repair cannot mend this: there is no copy. What can still be read:")?;
    let rows = left.namespaces.iter().map(|one| {
        let there = if one.certain {
            "yes"
        } else {
            "it may have been removed"
        };
        [
            one.info.name.clone(),
            one.info.length.to_string(),
            format!("{:#x}", one.info.offset),
            there.to_owned(),
            format!(
                "skip={} count={}",
                one.info.offset >> 21,
                one.info.length.get() >> 21
            ),
        ]
    });
    let header = ["name", "size", "offset", "certain", "for dd"];
    output::table(header, &rows.collect::<Vec<_>>())?;
    output::line(format!(
        "Their bytes are where they were. Copy them out, from a file by\n  dd if={} of=NAME bs=2M skip=... \
         count=...\nand from a device by a program that maps it; then format anew with --force.",
        place.display()
    ))?;
    Ok(ExitCode::from(7))
}

pub(crate) fn resize(global: &Global, resize: &Create) -> anyhow::Result<()> {
    let pool = open(global, &resize.place, true)?;
    pool.resize(&resize.name, resize.size)?;
    let length = pool.attach(&resize.name)?.length();
    if global.json {
        return output::json(&json!({ "name": resize.name, "length": length.get() }));
    }
    output::line(format!("{} has {length}", resize.name))
}

pub(crate) fn remove(global: &Global, place: &Path, name: &str) -> anyhow::Result<()> {
    let pool = open(global, place, true)?;
    pool.remove(name)?;
    let quarantined: ByteSize = pool.info()?.quarantined;
    if global.json {
        return output::json(&json!({ "removed": name, "quarantined": quarantined.get() }));
    }
    output::line(format!("{name} is removed; {quarantined} in quarantine"))
}

pub(crate) fn evict(global: &Global, place: &Path, dead: u16) -> anyhow::Result<()> {
    let pool = open(global, place, true)?;
    pool.evict(HostId(dead))?;
    let freed = pool.reclaim()?;
    if global.json {
        return output::json(&json!({ "evicted": dead, "freed": freed.get() }));
    }
    output::line(format!("host {dead} is evicted; {freed} freed"))
}
