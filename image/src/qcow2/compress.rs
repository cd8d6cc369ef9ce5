//! Compressed clusters.
//!
//! zlib is read by `flate2` over `miniz_oxide`, zstd by `ruzstd`: both are Rust throughout, because
//! this is where hostile bytes are worked on hardest; libzstd would be faster. What comes out is
//! bounded by the cluster, and what zstd keeps meanwhile by [`WINDOW_MAX`].

use std::io::Read;

use flate2::{Decompress, FlushDecompress};
use ruzstd::decoding::StreamingDecoder;

use super::Compression;

/// Largest window of a zstd frame in bytes. No more than a cluster (2 MiB) is ever compressed at a
/// time; this is what RFC 8878, section 3.1.1.1.2, asks of every decoder.
const WINDOW_MAX: u64 = 8 << 20;

/// Decompresses a cluster of `cluster_size` bytes. What follows the compressed bytes in `input` is
/// ignored, as its length is stated in sectors.
///
/// # Errors
/// What is wrong with the bytes.
pub(crate) fn decompress(
    compression: Compression,
    input: &[u8],
    cluster_size: usize,
) -> Result<Vec<u8>, &'static str> {
    let mut cluster = vec![0; cluster_size];
    match compression {
        Compression::Zlib => inflate(input, &mut cluster)?,
        Compression::Zstd => unzstd(input, &mut cluster)?,
    }
    Ok(cluster)
}

/// A raw deflate stream, without a zlib header.
fn inflate(input: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    let mut stream = Decompress::new(false);
    let ended = stream.decompress(input, cluster, FlushDecompress::Finish);
    match ended {
        Ok(_) if stream.total_out() == cluster.len() as u64 => Ok(()),
        Ok(_) => Err("less than a cluster comes out of its deflate stream"),
        Err(_) => Err("its deflate stream is damaged"),
    }
}

fn unzstd(input: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    let frame = StreamingDecoder::new_with_max_window_size(input, WINDOW_MAX);
    let mut frame = frame.map_err(|_| "its zstd frame is damaged")?;
    frame.read_exact(cluster).map_err(|_| "no cluster comes out of its zstd frame")?;
    match frame.read(&mut [0]) {
        Ok(0) => Ok(()),
        _ => Err("more than a cluster comes out of its zstd frame"),
    }
}
