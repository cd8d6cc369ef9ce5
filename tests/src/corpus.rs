//! The corpus: raw root images of Debian, made by `cargo xtask corpus`, and the hashes of their blocks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sapwood_image::sealed::Hash;

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
pub fn hashes(image: &Path) -> Result<Vec<Hash>> {
    read_hashes(image).with_context(|| format!("reading {}", image.display()))
}

fn read_hashes(image: &Path) -> io::Result<Vec<Hash>> {
    let file = File::open(image)?;
    let mut hashes = vec![Hash::ZERO; file.metadata()?.len() as usize / BLOCK_BYTES];
    let mut buffer = vec![0; BATCH * BLOCK_BYTES];
    let mut at = next_data(&file, 0)?;
    while at < hashes.len() {
        let count = BATCH.min(hashes.len() - at);
        let batch = &mut buffer[..count * BLOCK_BYTES];
        file.read_exact_at(batch, (at * BLOCK_BYTES) as u64)?;
        for (block, hash) in batch.chunks(BLOCK_BYTES).zip(&mut hashes[at..]) {
            *hash = Hash::of_block(block);
        }
        at = next_data(&file, at + count)?;
    }
    Ok(hashes)
}

/// The first block from `block` on that is not in a hole.
fn next_data(file: &File, block: usize) -> io::Result<usize> {
    match seek(file, SeekFrom::Data((block * BLOCK_BYTES) as u64)) {
        Ok(offset) => Ok(offset as usize / BLOCK_BYTES),
        Err(Errno::NXIO) => Ok(usize::MAX),
        Err(error) => Err(error.into()),
    }
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
            assert_eq!(!hash.is_zero(), i == marked, "block {i}");
        }
        let mut block = vec![0; BLOCK_BYTES];
        block[BLOCK_BYTES - 1] = b'x';
        assert_eq!(hashes[marked], Hash::of_block(&block));
    }
}
