//! The Hugging Face layout: every stored file is a shard, and an index says which tensor is where.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::json;

use super::Builder;
use crate::attach::TensorRef;
use crate::element::ElementType;
use crate::error::Result;
use crate::id::ObjectId;
use crate::object::{self, Member, pack_order};
use crate::source::{GRAPH, HEADER, INDEX, METADATA};

/// A shard to be: a stored file as it is, or the tensors that none has under the right name.
enum Shard<'a> {
    Linked(ObjectId, Vec<TensorRef<'a>>),
    Copied(Vec<TensorRef<'a>>),
}

pub(super) fn build(builder: &mut Builder<'_>) -> Result<()> {
    let model = builder.model;
    let mut by_object: BTreeMap<ObjectId, Vec<TensorRef<'_>>> = BTreeMap::new();
    for tensor in model.tensors() {
        let tensor = tensor?;
        if let ElementType::Block(block) = tensor.entry.element {
            return Err(builder.unsupported(format!(
                "`{}` is {}, which safetensors does not know",
                tensor.entry.name,
                block.name()
            )));
        }
        by_object
            .entry(tensor.entry.object)
            .or_default()
            .push(tensor);
    }

    let mut shards = Vec::new();
    let mut renamed = Vec::new();
    for (object, tensors) in by_object {
        let (shown, left) = shown_as(builder, &object, tensors)?;
        if !shown.is_empty() {
            shards.push(Shard::Linked(object, shown));
        }
        renamed.extend(left);
    }
    // In the order of the model's own names.
    shards.sort_by(|a, b| a.tensors()[0].entry.name.cmp(&b.tensors()[0].entry.name));
    if !renamed.is_empty() {
        renamed.sort_by(|a, b| {
            let (a, b) = (a.entry, b.entry);
            pack_order((a.element, &a.name), (b.element, &b.name))
        });
        shards.push(Shard::Copied(renamed));
    }

    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        match shard {
            Shard::Linked(object, tensors) => {
                let bytes = tensors.iter().map(|tensor| tensor.entry.len).sum();
                builder.link(*object, &name, bytes)?;
            }
            Shard::Copied(tensors) => copy(builder, &name, tensors)?,
        }
        for tensor in shard.tensors() {
            weight_map.insert(tensor.entry.name.as_str(), name.clone());
        }
    }
    let index = json!({
        "metadata": {"total_size": model.manifest().byte_size()},
        "weight_map": weight_map,
    });
    builder.write(INDEX, vec![index.to_string().into_bytes().into()])?;
    for sidecar in &model.manifest().sidecars {
        if ![METADATA, GRAPH, HEADER, INDEX].contains(&sidecar.name.as_str()) {
            builder.write(&sidecar.name, vec![Cow::Borrowed(&sidecar.bytes)])?;
        }
    }
    Ok(())
}

impl<'a> Shard<'a> {
    fn tensors(&self) -> &[TensorRef<'a>] {
        match self {
            Self::Linked(_, tensors) | Self::Copied(tensors) => tensors,
        }
    }
}

/// Divides a model's tensors in a stored file into those that the file shows under the model's own
/// names, and the others. A loader takes all that a shard has, so a file that shows anything else
/// is not shown at all.
fn shown_as<'a>(
    builder: &Builder<'_>,
    object: &ObjectId,
    tensors: Vec<TensorRef<'a>>,
) -> Result<(Vec<TensorRef<'a>>, Vec<TensorRef<'a>>)> {
    let file = builder.model.open_object(object)?;
    let path = builder.store.object_path(object).unwrap_or_default();
    let (data, members) = object::read_header(&file, &path)?;
    let mut places = BTreeMap::new();
    let mut offset = data;
    for member in &members {
        places.insert(member.name.as_str(), (offset, member));
        offset += member.len;
    }
    let (shown, left): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|tensor| {
        let entry = tensor.entry;
        places
            .get(entry.name.as_str())
            .is_some_and(|(offset, member)| {
                (*offset == entry.offset || entry.len == 0)
                    && member.element == entry.element
                    && member.shape == entry.shape
            })
    });
    if shown.len() == members.len() {
        Ok((shown, left))
    } else {
        Ok((Vec::new(), [shown, left].concat()))
    }
}

fn copy<'a>(builder: &mut Builder<'a>, name: &str, tensors: &[TensorRef<'a>]) -> Result<()> {
    let members: Vec<Member> = tensors
        .iter()
        .map(|tensor| Member {
            name: tensor.entry.name.clone(),
            element: tensor.entry.element,
            shape: tensor.entry.shape.clone(),
            len: tensor.entry.len,
        })
        .collect();
    let mut parts = vec![Cow::Owned(object::header(&members))];
    parts.extend(tensors.iter().map(|tensor| Cow::Borrowed(tensor.bytes)));
    builder.write(name, parts)
}
