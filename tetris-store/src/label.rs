//! Labels: names that people give to models.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use crate::backing::read_dir;
use crate::error::{Error, Result};
use crate::id::ModelId;
use crate::root::{Root, replace_link};

/// The longest label, in bytes.
const LONGEST: usize = 128;

fn is_label(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+@".contains(&byte);
    (1..=LONGEST).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(allowed)
}

fn path(root: &Root, label: &str) -> Result<PathBuf> {
    if is_label(label) {
        Ok(root.names().join(label))
    } else {
        Err(Error::BadLabel {
            label: label.chars().take(LONGEST).collect(),
        })
    }
}

/// The model that goes by `label`, which may be gone.
pub(crate) fn get(root: &Root, label: &str) -> Result<Option<ModelId>> {
    let Ok(path) = path(root, label) else {
        return Ok(None);
    };
    match fs::read_link(&path) {
        Ok(target) => Ok(target.to_str().and_then(|text| text.parse().ok())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Fails where `label` is none.
pub(crate) fn check(label: &str) -> Result<()> {
    if is_label(label) {
        return Ok(());
    }
    Err(Error::BadLabel {
        label: label.chars().take(LONGEST).collect(),
    })
}

pub(crate) fn set(root: &Root, label: &str, model: &ModelId) -> Result<()> {
    replace_link(&model.to_string(), &path(root, label)?, &root.tmp())
}

pub(crate) fn remove(root: &Root, label: &str) -> Result<bool> {
    let path = path(root, label)?;
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", path)(error)),
    }
}

/// Every label and its model, sorted by label.
pub(crate) fn all(root: &Root) -> Result<Vec<(String, ModelId)>> {
    let mut labels = Vec::new();
    for entry in read_dir(&root.names())? {
        let Some(label) = entry.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        if let Some(model) = get(root, &label)? {
            labels.push((label, model));
        }
    }
    labels.sort_unstable();
    Ok(labels)
}
