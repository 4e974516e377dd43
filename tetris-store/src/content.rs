//! Hashing one tensor's bytes in pieces, on several threads.
//!
//! BLAKE3 is a binary tree over chunks of 1,024 bytes, so that a piece whose size is a power of two
//! and whose offset is a multiple of it is a subtree of its own.

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

/// Bytes in a piece, but for the last one: a power of two, large against a system call's cost, and
/// small enough to stay in a core's second-level cache between being read, hashed and written.
pub(crate) const PIECE: usize = 1 << 20;

/// What is known of a tensor's content: the digests of its pieces.
#[derive(Debug)]
pub(crate) struct ContentHasher {
    /// As far as they are known. A sparse file may claim more pieces than memory could describe, so
    /// this grows with what has been read.
    pieces: Vec<Piece>,
    of: usize,
}

#[derive(Debug, Clone, Copy)]
enum Piece {
    Missing,
    Subtree(ChainingValue),
    /// The only piece there is.
    Whole(blake3::Hash),
}

/// How many pieces `len` bytes have; at least one.
pub(crate) const fn pieces(len: u64) -> usize {
    let pieces = len.div_ceil(PIECE as u64);
    if pieces == 0 { 1 } else { pieces as usize }
}

impl ContentHasher {
    pub(crate) fn new(len: u64) -> Self {
        Self {
            pieces: Vec::new(),
            of: pieces(len),
        }
    }

    /// The digest of piece `index` of a content that has `of` pieces.
    pub(crate) fn hash_piece(index: usize, of: usize, bytes: &[u8]) -> PieceDigest {
        PieceDigest(if of == 1 {
            Piece::Whole(blake3::hash(bytes))
        } else {
            let mut hasher = blake3::Hasher::new();
            hasher.set_input_offset((index * PIECE) as u64);
            hasher.update(bytes);
            Piece::Subtree(hasher.finalize_non_root())
        })
    }

    /// Takes in the digest of piece `index`.
    pub(crate) fn set(&mut self, index: usize, digest: PieceDigest) {
        if index >= self.pieces.len() {
            self.pieces.resize(index + 1, Piece::Missing);
        }
        self.pieces[index] = digest.0;
    }

    /// The digest of the whole, once every piece has been set.
    pub(crate) fn finish(&self) -> Option<blake3::Hash> {
        if self.pieces.len() < self.of {
            return None;
        }
        if let [Piece::Whole(hash)] = self.pieces[..] {
            return Some(hash);
        }
        let (left, right) = split(&self.pieces)?;
        Some(merge_subtrees_root(
            &subtree(left)?,
            &subtree(right)?,
            Mode::Hash,
        ))
    }
}

/// The digest of one piece.
#[derive(Debug)]
pub(crate) struct PieceDigest(Piece);

/// A node's left child is the largest complete subtree that leaves something for the right one.
fn split(pieces: &[Piece]) -> Option<(&[Piece], &[Piece])> {
    let left = pieces.len().checked_next_power_of_two()? / 2;
    (left > 0).then(|| pieces.split_at(left))
}

fn subtree(pieces: &[Piece]) -> Option<ChainingValue> {
    match pieces {
        [Piece::Subtree(value)] => Some(*value),
        [_] | [] => None,
        _ => {
            let (left, right) = split(pieces)?;
            Some(merge_subtrees_non_root(
                &subtree(left)?,
                &subtree(right)?,
                Mode::Hash,
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_give_the_hash_of_the_whole() {
        let bytes: Vec<u8> = (0..7 * PIECE + 12_345)
            .map(|i| ((i * i) >> 7) as u8)
            .collect();
        for len in [
            0,
            1,
            PIECE - 1,
            PIECE,
            PIECE + 1,
            2 * PIECE,
            5 * PIECE + 1,
            bytes.len(),
        ] {
            let bytes = &bytes[..len];
            let of = pieces(len as u64);
            let mut content = ContentHasher::new(len as u64);
            for index in (0..of).rev() {
                assert!(content.finish().is_none());
                let piece = &bytes[index * PIECE..len.min((index + 1) * PIECE)];
                content.set(index, ContentHasher::hash_piece(index, of, piece));
            }
            assert_eq!(content.finish(), Some(blake3::hash(bytes)), "{len} bytes");
        }
    }
}
