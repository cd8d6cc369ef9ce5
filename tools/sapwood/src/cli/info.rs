//! `sapwood info`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use sapwood_blockdev::units::BLOCK_SIZE;
use sapwood_image::Format;
use sapwood_image::info::{DiskInfo, info};
use sapwood_image::layer::LayerInfo;
use serde_json::{Value, json};

use super::output::{self, Output};
use super::size;
use crate::host::Host;

/// Describe a disk
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood info vm1.layer
  sapwood info --output=json vm1.layer | jq '.\"virtual-size\"'")]
pub struct Info {
    /// Format of the disk; without it, a file that is no layer is described as raw
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// The disk
    #[arg(value_name = "DISK")]
    path: PathBuf,
}

impl Info {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (storage, path, format) = (host.storage(), self.path, self.format);
        let info = host.block_on(|io| async move { info(&storage, &io, &path, format).await })?;
        match self.output {
            Output::Human => output::print(&text(&info)),
            Output::Json => output::print_json(&json(&info)),
        }
    }
}

fn text(info: &DiskInfo) -> String {
    let mut text = format!(
        "image: {}\nfile format: {}\nvirtual size: {}\ndisk size: {}\n",
        info.path.display(),
        info.format,
        size::display(info.virtual_size),
        size::short(info.actual_size),
    );
    if info.is_device {
        text.push_str("storage: a block device\n");
    }
    if !info.is_direct {
        text.push_str("I/O: buffered (the file system has no direct I/O for this file)\n");
    }
    if info.gives_space_back == Some(false) {
        let what = if info.is_device { "discard" } else { "hole punching" };
        text.push_str(&format!("unused space: not given back (no {what})\n"));
    }
    if let Some(layer) = &info.layer {
        // Writing to a string does not fail.
        let _ = write_layer(&mut text, layer);
    }
    text
}

fn write_layer(text: &mut String, layer: &LayerInfo) -> std::fmt::Result {
    if let Some(base) = &layer.base {
        write!(text, "backing file: {}", base.path.display())?;
        if let Some(full) = layer.base_path.as_ref().filter(|full| **full != base.path) {
            write!(text, " (actual path: {})", full.display())?;
        }
        writeln!(text, "\nbacking file format: {}", base.format)?;
    }
    writeln!(text, "Format specific information:")?;
    writeln!(text, "    id: {}", layer.id)?;
    writeln!(text, "    block size: {BLOCK_SIZE}")?;
    writeln!(text, "    segment size: {}", layer.segment_size)?;
    writeln!(text, "    live data: {}", size::short(layer.live_blocks * BLOCK_SIZE))?;
    writeln!(text, "    dead data: {}", size::short(layer.dead_blocks * BLOCK_SIZE))?;
    writeln!(text, "    generation: {}", layer.generation)?;
    writeln!(text, "    sequence: {}", layer.sequence)?;
    writeln!(text, "    stopped cleanly: {}", layer.clean)
}

fn json(info: &DiskInfo) -> Value {
    let mut value = json!({
        "filename": info.path,
        "format": info.format.name(),
        "virtual-size": info.virtual_size,
        "actual-size": info.actual_size,
        "dirty-flag": info.layer.as_ref().is_some_and(|layer| !layer.clean),
        "block-device": info.is_device,
        "direct-io": info.is_direct,
    });
    if let Some(gives_space_back) = info.gives_space_back {
        value["gives-space-back"] = gives_space_back.into();
    }
    let Some(layer) = &info.layer else { return value };
    value["cluster-size"] = BLOCK_SIZE.into();
    value["format-specific"] = json!({
        "type": info.format.name(),
        "data": {
            "id": layer.id,
            "segment-size": layer.segment_size,
            "live-bytes": layer.live_blocks * BLOCK_SIZE,
            "dead-bytes": layer.dead_blocks * BLOCK_SIZE,
            "generation": layer.generation,
            "sequence": layer.sequence,
        },
    });
    if let Some(base) = &layer.base {
        value["backing-filename"] = json!(base.path);
        value["full-backing-filename"] = json!(layer.base_path);
        value["backing-filename-format"] = base.format.name().into();
    }
    value
}
