//! `tetris plan`.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use carlsbad_types::ByteSize;
use serde::Deserialize;
use serde_json::json;
use tetris_store::runtime::{CpuPrice, Profile};
use tetris_store::schedule::{Function, Node, Placement, place};

use crate::options::{Global, PlacementKind, Plan};
use crate::output;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Input {
    nodes: Vec<Node>,
    functions: Vec<InputFunction>,
    #[serde(default)]
    cpu_price: CpuPrice,
}

/// A function whose tensors are given, or those of a stored model.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InputFunction {
    name: String,
    model: Option<String>,
    tensors: Option<Vec<(String, ByteSize)>>,
    profile: Profile,
    slo_s: f64,
    rps: f64,
}

pub(crate) fn plan(global: &Global, plan: &Plan) -> anyhow::Result<()> {
    let text = if plan.file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        text
    } else {
        std::fs::read_to_string(&plan.file)
            .with_context(|| format!("cannot read {}", plan.file.display()))?
    };
    let input: Input = serde_json::from_str(&text)
        .with_context(|| format!("{} is no plan's input (see --help)", plan.file.display()))?;
    let mut functions = Vec::with_capacity(input.functions.len());
    for function in input.functions {
        let tensors = match (function.tensors, function.model) {
            (Some(tensors), None) => tensors,
            (None, Some(model)) => Function::tensors_of(&global.backend()?.manifest(&model)?),
            _ => bail!("`{}` needs either `tensors` or `model`", function.name),
        };
        let slo = std::time::Duration::try_from_secs_f64(function.slo_s)
            .with_context(|| format!("`slo_s` of `{}`", function.name))?;
        functions.push(Function {
            name: function.name,
            tensors,
            profile: function.profile,
            slo,
            rps: function.rps,
        });
    }
    let placement = match plan.placement {
        PlacementKind::Union => Placement::Union,
        PlacementKind::Pairwise => Placement::Pairwise,
    };
    let made = place(&functions, &input.nodes, input.cpu_price, placement)?;
    if global.json {
        let instances: Vec<_> = made
            .instances
            .iter()
            .map(|one| {
                json!({
                    "function": functions[one.function].name,
                    "node": input.nodes[one.node].name,
                    "row": one.row,
                    "rps": one.rps,
                })
            })
            .collect();
        let nodes: Vec<_> = input
            .nodes
            .iter()
            .zip(made.tensor_bytes.iter().zip(&made.private_bytes))
            .map(|(node, (tensors, private))| {
                json!({ "name": node.name, "tensor_bytes": tensors, "private_bytes": private })
            })
            .collect();
        return output::json(
            &json!({ "instances": instances, "nodes": nodes, "bytes": made.bytes() }),
        );
    }
    let rows: Vec<_> = made
        .instances
        .iter()
        .map(|one| {
            [
                functions[one.function].name.clone(),
                input.nodes[one.node].name.clone(),
                one.row.cpus.to_string(),
                one.row.batch.to_string(),
                one.row.concurrency.to_string(),
                format!("{:.1}", one.rps),
            ]
        })
        .collect();
    output::table(
        ["FUNCTION", "NODE", "CPUS", "BATCH", "CONCURRENCY", "RPS"],
        &rows,
    )?;
    output::line("")?;
    for (node, (tensors, private)) in input
        .nodes
        .iter()
        .zip(made.tensor_bytes.iter().zip(&made.private_bytes))
    {
        let name = &node.name;
        output::line(format!(
            "{name}: {tensors} of tensors, {private} of its instances' own"
        ))?;
    }
    output::line(format!(
        "in all {} on {} machines",
        made.bytes(),
        input.nodes.len()
    ))
}
