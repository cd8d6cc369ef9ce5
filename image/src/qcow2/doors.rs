//! Doors to the private parsers, for the fuzz crate only.

use super::header::Header;
use super::{Compression, compress, snapshot};

/// Parses a header; whether it is one.
pub fn header(first_cluster: &[u8]) -> bool {
    Header::parse(first_cluster).is_ok()
}

/// Parses an entry of a snapshot table; its length, if it is one.
pub fn snapshot(bytes: &[u8]) -> Option<usize> {
    snapshot::parse(bytes, 0).ok().flatten().map(|(_, len)| len)
}

/// Decompresses a cluster; whether it is one.
pub fn cluster(zstd: bool, input: &[u8], cluster_size: usize) -> bool {
    let compression = if zstd { Compression::Zstd } else { Compression::Zlib };
    compress::decompress(compression, input, cluster_size).is_ok()
}
