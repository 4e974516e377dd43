//! Commands on what is stored.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use carlsbad_types::ByteSize;
use serde_json::json;
use tetris_store::agent::Listed;
use tetris_store::{IngestOptions, open_model};

use crate::backend::Backend;
use crate::options::{Global, Ingest, Label, Overlap, Reclaim, Rm, Show, Verify, View};
use crate::output::{self, Bar};

pub(crate) fn ingest(global: &Global, ingest: &Ingest) -> anyhow::Result<()> {
    ensure!(
        ingest.label.is_none() || ingest.files.len() == 1,
        "one label for {} models: ingest them one by one",
        ingest.files.len()
    );
    let backend = match global.socket() {
        Some(_) => {
            let why = "--quota is the store's own limit: give it to `tetris serve`";
            ensure!(ingest.quota.is_none(), why);
            global.backend()?
        }
        None => Backend::Store(global.new_store(|config| config.quota = ingest.quota)?),
    };
    let mut all = Vec::new();
    for file in &ingest.files {
        let bar = Bar::new(&file.display().to_string(), global.json)?;
        let progress = |progress| bar.show(progress);
        let options = IngestOptions {
            label: ingest.label.as_deref(),
            progress: Some(&progress),
        };
        let ingested = match &backend {
            Backend::Store(store) => {
                open_model(file).and_then(|model| store.ingest_with(&*model, &options))
            }
            Backend::Agent(client) => client.ingest(file, &options),
        };
        drop(bar);
        let ingested = match ingested {
            Ok(ingested) => ingested,
            Err(error) => {
                // Those before it are in the store.
                if global.json && !all.is_empty() {
                    output::json(&all)?;
                }
                return Err(error).with_context(|| format!("cannot ingest {}", file.display()));
            }
        };
        if global.json {
            all.push(ingested);
        } else {
            output::line(format!(
                "{:.12}  {} in {} tensors, {} of it new  {}",
                ingested.model,
                ingested.bytes,
                ingested.tensors,
                ingested.written,
                file.display()
            ))?;
        }
    }
    if global.json {
        output::json(&all)?;
    }
    Ok(())
}

pub(crate) fn list(global: &Global) -> anyhow::Result<()> {
    let models = match global.backend()? {
        Backend::Store(store) => Listed::all(&store)?,
        Backend::Agent(client) => client.models()?,
    };
    if global.json {
        return output::json(&models);
    }
    let rows: Vec<_> = models
        .iter()
        .map(|model| {
            [
                format!("{:.12}", model.id),
                model.format.name().to_owned(),
                model.tensors.to_string(),
                model.bytes.to_string(),
                match model.idle {
                    None => "leased".to_owned(),
                    Some(idle) => format!("idle {}", output::time(idle)),
                },
                model.labels.join(" "),
            ]
        })
        .collect();
    output::table(
        ["MODEL", "FORMAT", "TENSORS", "SIZE", "STATE", "LABELS"],
        &rows,
    )
}

pub(crate) fn show(global: &Global, show: &Show) -> anyhow::Result<()> {
    let backend = global.backend()?;
    let manifest = backend.manifest(&show.model)?;
    let id = manifest.id(&global.domain());
    if global.json {
        return output::json(&json!({ "id": id, "manifest": manifest }));
    }
    output::line(format!("model    {id}"))?;
    output::line(format!("format   {}", manifest.format.name()))?;
    output::line(format!(
        "size     {} in {} tensors and {} stored files",
        manifest.byte_size(),
        manifest.tensors.len(),
        manifest.objects().len()
    ))?;
    for sidecar in &manifest.sidecars {
        let size = ByteSize::new(sidecar.bytes.len() as u64);
        output::line(format!("with     {} ({size})", sidecar.name))?;
    }
    output::line("")?;
    let rows: Vec<_> = manifest
        .tensors
        .iter()
        .map(|tensor| {
            [
                format!("{:.12}", tensor.id),
                tensor.element.to_string(),
                tensor.shape.to_string(),
                ByteSize::new(tensor.len).to_string(),
                tensor.name.clone(),
            ]
        })
        .collect();
    output::table(["TENSOR", "TYPE", "SHAPE", "SIZE", "NAME"], &rows)
}

pub(crate) fn view(global: &Global, view: &View) -> anyhow::Result<()> {
    let exported = match global.backend()? {
        Backend::Store(store) => {
            let model = store.resolve(&view.model)?;
            store.export_view(&model, view.kind.into(), &view.folder)?
        }
        Backend::Agent(client) => {
            let name = view.folder.to_str().context("the view's name is no text")?;
            client.export_view(&view.model, view.kind.into(), name)?
        }
    };
    if global.json {
        return output::json(&exported);
    }
    output::line(format!(
        "{}  {} files: {} shared, {} of its own",
        exported.path.display(),
        exported.files.len(),
        exported.linked,
        exported.copied
    ))
}

pub(crate) fn overlap(global: &Global, overlap: &Overlap) -> anyhow::Result<()> {
    let backend = global.backend()?;
    let model = backend.manifest(&overlap.model)?;
    let others = overlap.others.iter().map(|other| backend.manifest(other));
    let others = others.collect::<anyhow::Result<Vec<_>>>()?;
    let found = model.overlap(&others);
    if global.json {
        return output::json(&found);
    }
    output::line(format!(
        "{} of {} ({:.1}%) is in the others as well, {} is not",
        found.shared,
        overlap.model,
        found.ratio() * 100.0,
        found.missing
    ))
}

pub(crate) fn stats(global: &Global) -> anyhow::Result<()> {
    let (stats, agent) = match global.backend()? {
        Backend::Store(store) => (store.stats()?, None),
        Backend::Agent(client) => {
            let agent = client.stats()?;
            (agent.store.clone(), Some(agent))
        }
    };
    if global.json {
        return match agent {
            Some(agent) => output::json(&agent),
            None => output::json(&stats),
        };
    }
    output::line(format!("models   {}", stats.models))?;
    output::line(format!(
        "stored   {} in {} files",
        stats.stored, stats.objects
    ))?;
    output::line(format!("besides  {} of manifests", stats.manifests))?;
    let saved = 1.0 - stats.stored.ratio_of(stats.private);
    output::line(match stats.private {
        ByteSize::ZERO => "private  nothing".to_owned(),
        private => format!(
            "private  {private} if each model had its own copy ({:.1}% saved)",
            saved.max(0.0) * 100.0
        ),
    })?;
    if let Some(quota) = stats.quota {
        output::line(format!("quota    {quota}"))?;
    }
    if let Some(agent) = agent {
        let most = agent.quota_per_user.map(|quota| format!(" of {quota}"));
        output::line(format!(
            "yours    {}{}",
            agent.yours,
            most.unwrap_or_default()
        ))?;
        output::line(format!("clients  {}", agent.clients))?;
    }
    Ok(())
}

pub(crate) fn reclaim(global: &Global, reclaim: &Reclaim) -> anyhow::Result<()> {
    let report = match global.socket() {
        // It has a keep-alive time of its own.
        Some(_) => match global.backend()? {
            Backend::Agent(client) => client.reclaim()?,
            Backend::Store(store) => store.reclaim()?,
        },
        None => global
            .store(|config| config.keep_alive = reclaim.keep_alive)?
            .reclaim()?,
    };
    if global.json {
        return output::json(&report);
    }
    output::line(format!(
        "freed {} models and {} files, {}; {} models leased, {} things idle, {} files in views",
        report.freed.len(),
        report.freed_objects,
        report.freed_bytes,
        report.leased,
        report.idle,
        report.viewed
    ))
}

pub(crate) fn verify(global: &Global, verify: &Verify) -> anyhow::Result<ExitCode> {
    let backend = global.backend()?;
    let store = backend.visible_store()?;
    let report = store.verify()?;
    if global.json {
        output::json(&report)?;
    } else {
        output::line(format!(
            "{} files are sound, {} read",
            report.sound, report.bytes
        ))?;
        for damage in &report.damaged {
            let what = match &damage.object {
                Some(object) => format!("file {object}"),
                None => "manifest".to_owned(),
            };
            let models: BTreeSet<_> = damage.models.iter().map(|id| format!("{id:.12}")).collect();
            let models = models.into_iter().collect::<Vec<_>>().join(" ");
            output::line(format!("damaged {what}: {} (models {models})", damage.why))?;
        }
    }
    if report.damaged.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    if verify.discard {
        store.discard(&report)?;
    }
    Ok(ExitCode::FAILURE)
}

pub(crate) fn label(global: &Global, label: &Label) -> anyhow::Result<()> {
    match global.backend()? {
        Backend::Store(store) => store.set_label(&label.label, &store.resolve(&label.model)?)?,
        Backend::Agent(client) => client.set_label(&label.label, &label.model)?,
    }
    if global.json {
        return output::json(&json!({ "label": label.label }));
    }
    Ok(())
}

pub(crate) fn remove_label(global: &Global, rm: &Rm) -> anyhow::Result<()> {
    match global.backend()? {
        Backend::Store(store) => {
            if !store.remove_label(&rm.label)? {
                return Err(tetris_store::Error::UnknownModel {
                    name: rm.label.clone(),
                }
                .into());
            }
        }
        Backend::Agent(client) => client.remove_label(&rm.label)?,
    }
    if global.json {
        return output::json(&json!({ "removed": rm.label }));
    }
    Ok(())
}
