//! Checking what is stored against what it is called.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use carlsbad_types::ByteSize;

use serde::{Deserialize, Serialize};

use crate::content::{ContentHasher, PIECE, pieces};
use crate::error::{Error, Result};
use crate::id::{Domain, ModelId, ObjectId, TensorId};
use crate::lock::Lock;
use crate::object::{SINGLE_DATA_OFFSET, read_header};
use crate::store::Store;

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Stored files that are what their names say.
    pub sound: usize,
    /// Bytes that were read.
    pub bytes: ByteSize,
    /// Stored files and manifests that are not.
    pub damaged: Vec<Damage>,
}

/// Something in the store that is not what its name says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The stored file, where it is one.
    pub object: Option<ObjectId>,
    /// What is wrong.
    pub why: String,
    /// The models it makes unusable.
    pub models: Vec<ModelId>,
}

impl Store {
    /// Reads every stored file and every manifest again and compares their hashes with their names.
    ///
    /// # Errors
    /// [`Error::Io`]. Damage is no error: it is in the report.
    pub fn verify(&self) -> Result<VerifyReport> {
        let mut report = VerifyReport::default();
        let mut manifests = Vec::new();
        for id in self.model_ids()? {
            let why = match self.manifest(&id) {
                Ok(manifest) if manifest.id(&self.inner.config.domain) == id => {
                    manifests.push((id, manifest));
                    continue;
                }
                Ok(_) => "the manifest is not the one of this model".to_owned(),
                // Reclaimed meanwhile.
                Err(Error::UnknownModel { .. }) => continue,
                Err(Error::Damaged { why, .. }) => why,
                Err(error) => return Err(error),
            };
            report.damaged.push(Damage {
                object: None,
                why,
                models: vec![id],
            });
        }
        let users = |object: &ObjectId| {
            let uses = |tensor: &crate::TensorEntry| tensor.object == *object;
            let used = manifests.iter().filter(|(_, m)| m.tensors.iter().any(uses));
            used.map(|(id, _)| *id).collect::<Vec<_>>()
        };
        for object in self.inner.backing.list()? {
            let id = object.id;
            match self.examine(&id, &mut report.bytes)? {
                // Evicted meanwhile.
                None => {}
                Some(Ok(())) => report.sound += 1,
                Some(Err(why)) => report.damaged.push(Damage {
                    object: Some(id),
                    why,
                    models: users(&id),
                }),
            }
        }
        for (model, manifest) in &manifests {
            for object in manifest.objects() {
                // The model first: a sweep frees it, and then what only it needed.
                if !self.inner.backing.contains(&object)? && self.inner.root.model(model).exists() {
                    let why = "it is missing".to_owned();
                    let models = vec![*model];
                    report.damaged.push(Damage {
                        object: Some(object),
                        why,
                        models,
                    });
                }
            }
        }
        Ok(report)
    }

    /// Takes the damaged stored files and manifests of `report` out of the store, so that the next
    /// ingest stores them anew. Whoever has them mapped keeps them.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::Busy`]; [`Error::Io`].
    pub fn discard(&self, report: &VerifyReport) -> Result<()> {
        let _no_commits = self
            .inner
            .root
            .lock(Lock::Exclusive, self.inner.config.patience)?;
        for damage in &report.damaged {
            match &damage.object {
                // Looked at again: it may have been reclaimed or repaired since.
                Some(object) => {
                    if let Some(Err(_)) = self.examine(object, &mut ByteSize::default())? {
                        self.inner.backing.evict(object)?;
                    }
                }
                None => {
                    for model in &damage.models {
                        let sound = match self.manifest(model) {
                            Ok(manifest) => manifest.id(&self.inner.config.domain) == *model,
                            Err(Error::Damaged { .. }) => false,
                            Err(Error::UnknownModel { .. }) => continue,
                            Err(error) => return Err(error),
                        };
                        let path = self.inner.root.model(model);
                        if !sound {
                            std::fs::remove_file(&path).map_err(Error::io("remove", path))?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the stored file `id` is what its name says, or why not; `None` where there is none.
    fn examine(
        &self,
        id: &ObjectId,
        read: &mut ByteSize,
    ) -> Result<Option<std::result::Result<(), String>>> {
        let file = match self.inner.backing.open(id) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(None),
            Err(Error::Damaged { why, .. }) => return Ok(Some(Err(why))),
            Err(error) => return Err(error),
        };
        let path = self
            .object_path(id)
            .unwrap_or_else(|| PathBuf::from(id.to_string()));
        match check_object(&file, &path, id, &self.inner.config.domain, read) {
            Ok(()) => Ok(Some(Ok(()))),
            Err(Error::Damaged { why, .. }) => Ok(Some(Err(why))),
            Err(error) => Err(error),
        }
    }
}

/// Fails with [`Error::Damaged`] unless `file` is what `id` says.
fn check_object(
    file: &File,
    path: &Path,
    id: &ObjectId,
    domain: &Domain,
    read: &mut ByteSize,
) -> Result<()> {
    let (data, members) = read_header(file, path)?;
    let mut offset = data;
    let mut ids = Vec::with_capacity(members.len());
    let mut buffer = vec![0; PIECE];
    for member in &members {
        let of = pieces(member.len);
        let mut content = ContentHasher::new(member.len);
        for piece in 0..of {
            let begin = (piece * PIECE) as u64;
            let bytes = &mut buffer[..PIECE.min((member.len - begin) as usize)];
            file.read_exact_at(bytes, offset + begin)
                .map_err(Error::io("read", path))?;
            content.set(piece, ContentHasher::hash_piece(piece, of, bytes));
            *read += ByteSize::new(bytes.len() as u64);
        }
        offset += member.len;
        let content = content.finish().ok_or_else(|| Error::Damaged {
            path: path.to_owned(),
            why: "a tensor has no bytes".to_owned(),
        })?;
        ids.push(TensorId::from_content(
            domain,
            member.element,
            &member.shape,
            &content,
        ));
    }
    let is_single =
        |tensor: &TensorId| data == SINGLE_DATA_OFFSET && ObjectId::single(tensor) == *id;
    let names = members.iter().map(|member| member.name.as_str());
    if matches!(&ids[..], [tensor] if is_single(tensor)) || ObjectId::pack(names.zip(&ids)) == *id {
        return Ok(());
    }
    Err(Error::Damaged {
        path: path.to_owned(),
        why: "its bytes do not have the hash it is named by".to_owned(),
    })
}
