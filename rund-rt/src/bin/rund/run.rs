//! `rund run`, `rund template`, `rund probe`.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use rund_rt::{CloneSpec, Limits, Output, Reuse, Runtime, Stats, Stdin, TemplateSpec};
use serde_json::json;

use crate::options::{Build, Guest, Options, Run, TemplateCommand};
use crate::output;

/// What `guest` and `program` describe.
pub(crate) fn spec(guest: &Guest, program: &[OsString]) -> anyhow::Result<TemplateSpec> {
    let path = PathBuf::from(program.first().context("no program")?);
    let mut spec = TemplateSpec::new(&path)
        .args(program.iter().cloned())
        .env(guest.env.iter().cloned())
        .memory(guest.memory);
    if let Some(root) = &guest.root {
        // A program of the root is named by its path inside.
        if let Ok(relative) = path.strip_prefix("/") {
            let inside = root.join(relative);
            if inside.exists() {
                spec.program = inside;
                spec.inside = Some(path.clone());
            }
        }
        spec = spec.root(root);
    }
    spec.cwd.clone_from(&guest.cwd);
    Ok(spec)
}

pub(crate) fn run(options: &Options, run: &Run) -> anyhow::Result<ExitCode> {
    let runtime = Runtime::builder().build()?;
    let template = match &run.template {
        Some(path) => runtime.load(path, run.guest.root.as_deref())?,
        None => runtime.prepare(&spec(&run.guest, &run.program)?)?,
    };
    let mut limits = Limits::default();
    limits.run_time = run.timeout;
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
    })
}

pub(crate) fn template(options: &Options, command: &TemplateCommand) -> anyhow::Result<ExitCode> {
    let TemplateCommand::Build(build) = command;
    let Build {
        guest,
        at,
        output: path,
        program,
    } = build;
    let runtime = Runtime::builder().build()?;
    let template = runtime.prepare(&spec(guest, program)?.snapshot((*at).into()))?;
    template.save(path)?;
    if options.json {
        output::json(&json!({
            "template": path,
            "bytes": template.size().get(),
            "shared_draws": template.shared_draws(),
        }))?;
    } else {
        output::line(&format!("{}: {} of pages", path.display(), template.size()));
        if template.shared_draws() > 0 {
            output::line(&format!(
                "before it was saved the program asked {} times for entropy, a clock or an id: \
                 those answers are the same in every clone",
                template.shared_draws()
            ));
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
        output::line(&format!("{}: {}", found.backend, found.isolation));
        for detail in &found.details {
            output::line(&format!("  {detail}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}
