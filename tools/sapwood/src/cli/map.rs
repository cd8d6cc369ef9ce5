//! `sapwood map`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use sapwood_blockdev::device::BlockDevice;
use sapwood_image::{Disk, Extent, ExtentKind, Format};
use serde::Serialize;

use super::output::{self, Output};
use super::reading::Reading;
use super::size::Size;
use crate::host::Host;

/// Bytes of disk looked at in one go: bounds the memory of a fragmented map.
const WINDOW_LEN: u64 = 1 << 30;

/// Show which parts of a disk hold data, and in which file
///
/// The text lists stored data only; JSON lists everything, as `qemu-img map` does.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood map vm1.layer
  sapwood map -f raw --output=json debian.raw")]
// -l is the length, as in qemu-img.
#[command(mut_arg("snapshot", |snapshot| snapshot.short(None)))]
pub struct Map {
    /// Format of the disk; needed unless it is a layer or qcow2
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Where to begin
    #[arg(short, long, value_name = "OFFSET", default_value = "0")]
    start_offset: Size,

    /// How far to look; by default to the end of the disk
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<Size>,

    #[command(flatten)]
    reading: Reading,

    /// The disk
    #[arg(value_name = "DISK")]
    path: PathBuf,
}

/// One line of the JSON answer; the names are those of `qemu-img map`.
#[derive(Serialize)]
struct Entry<'a> {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    filename: Option<&'a str>,
}

impl Map {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let Size(start) = self.start_offset;
        let len = self.max_length.map_or(u64::MAX, |Size(n)| n);
        let options = self.reading.open(self.format, true);
        let (storage, path) = (host.storage(), self.path.clone());
        let extents = host.block_on(move |io| async move {
            let disk = Disk::open(&storage, &io, &path, options).await?;
            let end = start.saturating_add(len).min(disk.geometry().size);
            let mut extents = Vec::new();
            let mut at = start;
            while at < end {
                let window = at..end.min(at.saturating_add(WINDOW_LEN));
                at = window.end;
                disk.extents(&io, window)
                    .await?
                    .into_iter()
                    .for_each(|extent| Extent::push_to(&mut extents, extent));
            }
            disk.close(&io).await?;
            Ok(extents)
        })?;
        match self.output {
            Output::Human => output::print(&table(&extents)?),
            Output::Json => output::print(&json(&extents)?),
        }
    }
}

fn table(extents: &[Extent]) -> anyhow::Result<String> {
    let mut text = format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to");
    for extent in extents.iter().filter(|extent| holds_data(extent)) {
        let (start, len) = (hex(extent.start), hex(extent.len));
        let mapped = extent.offset.map(hex).unwrap_or_default();
        let file = extent.file.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
        writeln!(text, "{start:<16}{len:<16}{mapped:<16}{file}")?;
    }
    Ok(text)
}

fn holds_data(extent: &Extent) -> bool {
    matches!(extent.kind, ExtentKind::Data | ExtentKind::Compressed)
}

/// A number as C's `%#x` prints it, and so qemu-img: 0 has no prefix.
fn hex(n: u64) -> String {
    if n == 0 { "0".to_owned() } else { format!("{n:#x}") }
}

fn json(extents: &[Extent]) -> anyhow::Result<String> {
    let lines = extents.iter().map(|extent| serde_json::to_string(&entry(extent)));
    let lines = lines.collect::<Result<Vec<_>, _>>()?;
    Ok(format!("[{}]\n", lines.join(",\n")))
}

fn entry(extent: &Extent) -> Entry<'_> {
    Entry {
        start: extent.start,
        length: extent.len,
        depth: extent.depth,
        present: extent.kind != ExtentKind::Absent,
        zero: !holds_data(extent),
        data: holds_data(extent),
        compressed: extent.kind == ExtentKind::Compressed,
        offset: extent.offset,
        filename: extent.file.as_deref().and_then(|path| path.to_str()),
    }
}
