//! `rund run`, `rund template`, `rund probe`.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use carlsbad_types::ByteSize;
use rund_rt::cgroup::{CgroupPool, Hierarchy, PoolConfig};

use rund_rt::{
    CloneSpec, Limits, Output, ProcessBackend, Reuse, Runtime, Stats, Status, Stdin, TemplateSpec,
};
use serde_json::json;

use crate::options::{Build, Engine, Guest, Options, Run, TemplateCommand};
use crate::output;

/// What `guest` and `program` describe.
pub(crate) fn spec(guest: &Guest, program: &[OsString]) -> anyhow::Result<TemplateSpec> {
    let path = Path::new(program.first().context("no program")?);
    let mut spec = match &guest.root {
        // By its path inside, and never the host's of that name.
        Some(root) if path.is_absolute() => TemplateSpec::in_root(root, path)?,
        Some(root) => TemplateSpec::new(path).root(root),
        None => TemplateSpec::new(path),
    };
    spec = spec
        .args(program.iter().cloned())
        .env(guest.env.iter().cloned())
        .memory(guest.memory);
    spec.cwd.clone_from(&guest.cwd);
    Ok(spec)
}

/// A runtime with the backend that was asked for. One sandbox with such limits gets a control group.
pub(crate) fn runtime(guest: &Guest, limits: Option<&Limits>) -> anyhow::Result<Runtime> {
    let groups = limits
        .filter(|l| l.memory.is_some() || l.cpus.is_some() || l.processes.is_some())
        .map(|_| {
            let mut config = PoolConfig::default();
            config.name = "rund".to_owned();
            (config.ready, config.capacity) = (1, 2);
            CgroupPool::new(Hierarchy::detect()?, config).map(Arc::new)
        })
        .transpose()?;
    let mut builder = Runtime::builder();
    match guest.backend {
        Engine::KvmElf => {
            if let Some(pool) = groups {
                builder = builder.cgroups(pool);
            }
        }
        Engine::Process => {
            let mut backend = ProcessBackend::new();
            if let Some(pool) = groups {
                backend = backend.cgroups(pool);
            }
            builder = builder.backend(backend);
        }
    }
    Ok(builder.build()?)
}

fn limits(run: &Run) -> Limits {
    let mut limits = Limits::default();
    limits.run_time = run.timeout;
    limits.cpus = run.most.cpus;
    limits.memory = run.most.max_memory;
    limits.processes = run.most.max_processes;
    limits.upper = run.most.max_upper;
    limits
}

pub(crate) fn run(options: &Options, run: &Run) -> anyhow::Result<ExitCode> {
    let limits = limits(run);
    let runtime = runtime(&run.guest, Some(&limits))?;
    let template = match &run.template {
        Some(path) => runtime.load(path, run.guest.root.as_deref())?,
        None => runtime.prepare(&spec(&run.guest, &run.program)?)?,
    };
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let mut clone = CloneSpec::new()
        .stdin(Stdin::File(own(std::io::stdin().as_fd())?))
        .stdout(Output::File(own(std::io::stdout().as_fd())?))
        .stderr(Output::File(own(std::io::stderr().as_fd())?))
        .limits(limits)
        .reuse(Reuse::Fresh);
    if run.template.is_some() && !run.program.is_empty() {
        clone = clone.args(run.program.iter().cloned());
    }
    let exit = runtime.start(&template, clone)?.wait(None)?;
    if let (Status::TimedOut, Some(time)) = (exit.status, run.timeout) {
        output::note(&format!("rund: its {time:?} were over: it was ended"));
    }
    if run.stats {
        let text = if options.json {
            shown(&exit.stats).to_string()
        } else {
            format!(
                "started in {:.3} ms, ran {:.3} ms; {} system calls left the machine, {} did not; \
                 isolation: {}",
                exit.stats.start.as_secs_f64() * 1e3,
                exit.stats.run.as_secs_f64() * 1e3,
                exit.stats.exits,
                exit.stats.served_inside,
                exit.stats
                    .isolation
                    .map_or("none".into(), |i| i.to_string()),
            )
        };
        output::note(&text);
    }
    Ok(ExitCode::from(exit.status.shell_code() as u8))
}

fn shown(stats: &Stats) -> serde_json::Value {
    json!({
        "backend": stats.backend,
        "isolation": stats.isolation,
        "start_seconds": stats.start.as_secs_f64(),
        "run_seconds": stats.run.as_secs_f64(),
        "exits": stats.exits,
        "served_inside": stats.served_inside,
        "split_rootfs": stats.split_rootfs,
        "pooled_cgroup": stats.pooled_cgroup,
        "cpu_seconds": stats.usage.and_then(|u| u.cpu).map(|time| time.as_secs_f64()),
        "memory_peak_bytes": stats.usage.and_then(|u| u.memory_peak).map(ByteSize::get),
        "oom_kills": stats.usage.and_then(|u| u.oom_kills),
    })
}

pub(crate) fn template(options: &Options, command: &TemplateCommand) -> anyhow::Result<ExitCode> {
    let TemplateCommand::Build(build) = command;
    let Build {
        guest,
        at,
        deadline,
        output: path,
        program,
    } = build;
    let runtime = runtime(guest, None)?;
    let template = runtime.prepare(
        &spec(guest, program)?
            .deadline(*deadline)
            .snapshot((*at).into()),
    )?;
    template.save(path)?;
    if options.json {
        output::json(&json!({
            "template": path,
            "bytes": template.size().get(),
            "shared_draws": template.shared_draws(),
        }))?;
    } else {
        output::line(format!("{}: {} of pages", path.display(), template.size()))?;
        if template.shared_draws() > 0 {
            output::line(format!(
                "before it was saved the program asked {} times for entropy, a clock or an id: \
                 those answers are the same in every clone",
                template.shared_draws()
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn probe(options: &Options) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::builder().build()?;
    let found = runtime.capabilities();
    if options.json {
        output::json(found)?;
    } else {
        output::line(format!("{}: {}", found.backend, found.isolation))?;
        for detail in &found.details {
            output::line(format!("  {detail}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
