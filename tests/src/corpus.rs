//! The corpus: raw root images of Debian, made by `cargo xtask corpus`, and the hashes of their blocks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::guest::target_directory;

/// The images in the order in which they are imported.
pub const IMAGES: [&str; 6] = ["server", "web", "python", "database", "build", "documents"];
/// A later state of one of [`IMAGES`].
pub const AGED: &str = "aged";
/// The image in the directory of its name.
pub const IMAGE_FILE: &str = "disk.raw";

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks that are read at a time.
const BATCH: usize = 256;

/// The hash of a block; zeroes for one of zeroes.
pub type BlockHash = [u8; 32];

/// Where the corpus is: `SAPWOOD_CORPUS_DIR`, or else `corpus` beside the directory of profiles that this program was
/// built into.
///
/// # Errors
/// It is not there, or not whole; the message says what to do.
pub fn locate() -> Result<PathBuf> {
    let corpus = match std::env::var_os("SAPWOOD_CORPUS_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => target_directory()?.join("corpus"),
    };
    for name in IMAGES.iter().chain([&AGED]) {
        let image = image(&corpus, name);
        ensure!(image.exists(), "{} is missing: run `cargo xtask corpus`", image.display());
    }
    Ok(corpus)
}

/// The image `name` of the corpus in the directory `corpus`.
pub fn image(corpus: &Path, name: &str) -> PathBuf {
    corpus.join(name).join(IMAGE_FILE)
}

/// The hash of each block of a raw image; what is left over at its end is no block.
///
/// # Errors
/// The image cannot be read.
pub fn hashes(image: &Path) -> Result<Vec<BlockHash>> {
    let mut hashes = Vec::new();
    let take = |_, block: &[u8]| hashes.push(hash(block));
    each_block(image, take).with_context(|| format!("reading {}", image.display()))?;
    Ok(hashes)
}

fn hash(block: &[u8]) -> BlockHash {
    if block.iter().all(|byte| *byte == 0) { [0; 32] } else { blake3::hash(block).into() }
}

/// Gives every block of `image` with its number to `take`, in order.
fn each_block(image: &Path, mut take: impl FnMut(u64, &[u8])) -> io::Result<()> {
    let file = File::open(image)?;
    let blocks = file.metadata()?.len() / BLOCK_BYTES as u64;
    let mut buffer = vec![0; BATCH * BLOCK_BYTES];
    let mut at = 0;
    while at < blocks {
        let count = (blocks - at).min(BATCH as u64) as usize;
        let batch = &mut buffer[..count * BLOCK_BYTES];
        file.read_exact_at(batch, at * BLOCK_BYTES as u64)?;
        for (i, block) in batch.chunks(BLOCK_BYTES).enumerate() {
            take(at + i as u64, block);
        }
        at += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_hashed_in_order_and_zeroes_stay_zeroes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let count = BATCH + 3;
        file.as_file().set_len((count * BLOCK_BYTES + 1) as u64).unwrap();
        let marked = BATCH + 1;
        file.as_file().write_all_at(b"x", ((marked + 1) * BLOCK_BYTES - 1) as u64).unwrap();
        let hashes = hashes(file.path()).unwrap();
        assert_eq!(hashes.len(), count);
        for (i, hash) in hashes.iter().enumerate() {
            assert_eq!(*hash != [0; 32], i == marked, "block {i}");
        }
        let mut block = vec![0; BLOCK_BYTES];
        block[BLOCK_BYTES - 1] = b'x';
        assert_eq!(hashes[marked], *blake3::hash(&block).as_bytes());
    }
}
