//! `rund ps` and `rund stats`: the processes of sandboxes, of all owners on this machine.

use std::fs;
use std::process::ExitCode;

use rund_rt::{Isolation, Runtime};
use serde::Serialize;

use crate::options::Options;
use crate::output;

#[derive(Debug, Serialize)]
struct Process {
    pid: u32,
    role: &'static str,
    /// The process that started it: a zygote's owner, a monitor's zygote.
    parent: u32,
    /// Where this user may know.
    pss_bytes: Option<u64>,
    /// Of a monitor's guest: what backend `kvm-elf` gives on this machine.
    isolation: Option<Isolation>,
}

fn find() -> Vec<Process> {
    let mut found = Vec::new();
    let runtime = Runtime::builder().build();
    let isolation = runtime.ok().map(|it| it.capabilities().isolation);
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let role = match fs::read_to_string(entry.path().join("comm")).as_deref() {
            Ok("rund-zygote\n") => "zygote",
            Ok("rund-monitor\n") => "monitor",
            _ => continue,
        };
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        // Ended, and not yet waited for by its parent.
        if status.contains("\nState:\tZ") {
            continue;
        }
        let parent = status
            .lines()
            .find_map(|line| line.strip_prefix("PPid:"))
            .and_then(|pid| pid.trim().parse().ok());
        let rollup = fs::read_to_string(entry.path().join("smaps_rollup")).unwrap_or_default();
        let pss = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .and_then(|kib| kib.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        found.push(Process {
            pid,
            role,
            parent: parent.unwrap_or(0),
            pss_bytes: pss.map(|kib| kib << 10),
            isolation: isolation.filter(|_| role == "monitor"),
        });
    }
    found.sort_by_key(|process| (process.parent, process.pid));
    found
}

pub(crate) fn list(options: &Options) -> anyhow::Result<ExitCode> {
    let found = find();
    if options.json {
        output::json(&found)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line("    PID  PARENT  ROLE     ISOLATION     PSS")?;
    for process in found {
        let pss = process
            .pss_bytes
            .map_or("?".into(), |bytes| format!("{} KiB", bytes >> 10));
        output::line(format!(
            "{:>7} {:>7}  {:<8} {:<13} {pss}",
            process.pid,
            process.parent,
            process.role,
            process.isolation.map_or(String::new(), |it| it.to_string())
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn stats(options: &Options) -> anyhow::Result<ExitCode> {
    let found = find();
    let count = |role| found.iter().filter(|p| p.role == role).count();
    let bytes: u64 = found.iter().filter_map(|p| p.pss_bytes).sum();
    let (zygotes, monitors) = (count("zygote"), count("monitor"));
    if options.json {
        output::json(&serde_json::json!({
            "zygotes": zygotes,
            "monitors": monitors,
            "pss_bytes": bytes,
        }))?;
    } else {
        output::line(format!(
            "{zygotes} templates in use, {monitors} virtual machine monitors, {} KiB of memory \
             together (PSS)",
            bytes >> 10
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
