//! `sapwood info`.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use sapwood_blockdev::units::BLOCK_SIZE;
use sapwood_image::Format;
use sapwood_image::info::{DiskInfo, info};
use sapwood_image::layer::{BaseSpec, LayerInfo, Traffic};
use sapwood_image::qcow2::{Qcow2Info, Snapshot};
use sapwood_image::sealed::Hash;
use serde_json::{Value, json};

use super::online::{self, Online, Target};
use super::output::{self, Output};
use super::size;
use super::store::DefaultStore;
use super::store::show::show;
use crate::host::Host;
use crate::volumes::address::Address;

/// Describe a disk
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood info vm1.layer
  sapwood info --control /run/vm1.control        while it is being served
  sapwood info /srv/vms:web                      a volume of a store
  sapwood info --output=json vm1.layer | jq '.\"virtual-size\"'")]
pub struct Info {
    /// Format of the disk; without it, a file of no known format is described as raw
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    #[command(flatten)]
    online: Online,

    #[command(flatten)]
    store: DefaultStore,

    /// The disk, or a volume or snapshot of a store, as in sapwood show
    #[arg(value_name = "DISK", required_unless_present = "control", conflicts_with = "control")]
    path: Option<PathBuf>,
}

impl Info {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        if let Some(path) = &self.path
            && let Some(address) = Address::of_disk(path.as_os_str(), self.store.given())?
        {
            return show(host, address, self.output);
        }
        match (self.online.target(self.path.as_ref())?, self.output) {
            (Target::Served(client), Output::Json) => output::print_json(&client.disk()?),
            (Target::Served(client), Output::Human) => {
                let said = client.disk()?;
                let info =
                    of_json(&said).with_context(|| format!("the server says nothing known: {said}"))?;
                output::print(&text(&info))
            }
            (Target::Free(path), output) => {
                let (storage, path, format) = (host.storage(), path.to_owned(), self.format);
                let found = host.block_on(|io| async move { info(&storage, &io, &path, format).await });
                let info = online::advise(found)?;
                match output {
                    Output::Human => output::print(&text(&info)),
                    Output::Json => output::print_json(&json(&info)),
                }
            }
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
    if let Some(root) = &info.root {
        let _ = writeln!(text, "root: {root}");
    }
    if let Some(qcow2) = &info.qcow2 {
        let _ = write_qcow2(&mut text, qcow2);
    }
    text
}

fn write_layer(text: &mut String, layer: &LayerInfo) -> std::fmt::Result {
    if let Some(base) = &layer.store_base {
        writeln!(text, "base: {base}")?;
    }
    if let Some(base) = &layer.base {
        write!(text, "backing file: {}", base.path.display())?;
        if let Some(full) = layer.base_path.as_ref().filter(|full| **full != base.path) {
            write!(text, " (actual path: {})", full.display())?;
        }
        writeln!(text, "\nbacking file format: {}", base.format)?;
        if let Some(snapshot) = &base.options.snapshot {
            writeln!(text, "backing snapshot: {}", printable(snapshot))?;
        }
        writeln!(
            text,
            "backing chain: {} {}",
            layer.depth,
            if layer.depth == 1 { "image" } else { "images" }
        )?;
    }
    writeln!(text, "Format specific information:")?;
    writeln!(text, "    id: {}", layer.id)?;
    writeln!(text, "    block size: {BLOCK_SIZE}")?;
    writeln!(text, "    segment size: {}", layer.segment_size)?;
    writeln!(text, "    live data: {}", size::short(layer.live_blocks * BLOCK_SIZE))?;
    writeln!(text, "    dead data: {}", size::short(layer.dead_blocks * BLOCK_SIZE))?;
    writeln!(text, "    map: {}", size::short(layer.map_stored_bytes))?;
    write_traffic(text, &layer.traffic)?;
    writeln!(text, "    generation: {}", layer.generation)?;
    writeln!(text, "    sequence: {}", layer.sequence)?;
    writeln!(text, "    stopped cleanly: {}", layer.clean)
}

fn write_traffic(text: &mut String, traffic: &Traffic) -> std::fmt::Result {
    let Some(amplification) = traffic.amplification() else { return Ok(()) };
    let bytes = |blocks: u64| size::short(blocks.saturating_mul(BLOCK_SIZE));
    writeln!(
        text,
        "    written by guests: {} (amplification {amplification:.2}: {} moved by the cleaner, {} of the map, {} of the log)",
        bytes(traffic.guest),
        bytes(traffic.moved),
        bytes(traffic.nodes),
        bytes(traffic.index),
    )
}

fn write_qcow2(text: &mut String, qcow2: &Qcow2Info) -> std::fmt::Result {
    writeln!(text, "cluster_size: {}", qcow2.cluster_size)?;
    if let Some(backing) = &qcow2.backing {
        write!(text, "backing file: {}", printable(&backing.name))?;
        let full = printable(&backing.path.to_string_lossy());
        if full != printable(&backing.name) {
            write!(text, " (actual path: {full})")?;
        }
        writeln!(text)?;
        if let Some(format) = &backing.format {
            writeln!(text, "backing file format: {}", printable(format))?;
        }
    }
    if !qcow2.snapshots.is_empty() {
        writeln!(text, "Snapshot list:\n{:<10}{:<20}{:>14}", "ID", "NAME", "VM STATE")?;
        for Snapshot { id, name, vm_state_bytes, .. } in &qcow2.snapshots {
            let state = size::short(*vm_state_bytes);
            writeln!(text, "{:<10}{:<20}{state:>14}", printable(id), printable(name))?;
        }
    }
    writeln!(text, "Format specific information:")?;
    writeln!(text, "    compat: {}", compat(qcow2))?;
    writeln!(text, "    compression type: {}", qcow2.compression)?;
    writeln!(text, "    lazy refcounts: {}", qcow2.lazy_refcounts)?;
    writeln!(text, "    refcount bits: {}", qcow2.refcount_bits)?;
    if let Some(data_file) = &qcow2.data_file {
        writeln!(text, "    data file: {}", printable(data_file))?;
        writeln!(text, "    data file raw: {}", qcow2.data_file_raw)?;
    }
    writeln!(text, "    corrupt: {}", qcow2.corrupt)?;
    writeln!(text, "    extended l2: {}", qcow2.extended_l2)
}

/// What an image says, safe for a terminal.
fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// The version of the format, by the version of QEMU that brought it.
fn compat(qcow2: &Qcow2Info) -> &'static str {
    if qcow2.version == 2 { "0.10" } else { "1.1" }
}

/// A description as other programs read it.
pub fn json(info: &DiskInfo) -> Value {
    let mut value = json!({
        "filename": info.path,
        "format": info.format.name(),
        "virtual-size": info.virtual_size,
        "actual-size": info.actual_size,
        "dirty-flag": info.layer.as_ref().is_some_and(|layer| !layer.clean)
            || info.qcow2.as_ref().is_some_and(|qcow2| qcow2.dirty),
        "block-device": info.is_device,
        "direct-io": info.is_direct,
    });
    if let Some(gives_space_back) = info.gives_space_back {
        value["gives-space-back"] = gives_space_back.into();
    }
    if let Some(root) = &info.root {
        value["root"] = root.to_string().into();
    }
    if let Some(qcow2) = &info.qcow2 {
        add_qcow2(&mut value, qcow2);
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
            "map-bytes": layer.map_stored_bytes,
            "allowed-bytes": layer.allowed_bytes,
            "beside-bytes": layer.beside_bytes,
            "written-bytes": {
                "guest": written(layer.traffic.guest),
                "moved": written(layer.traffic.moved),
                "map": written(layer.traffic.nodes),
                "log": written(layer.traffic.index),
            },
            "generation": layer.generation,
            "sequence": layer.sequence,
        },
    });
    if let Some(base) = &layer.base {
        value["backing-filename"] = json!(base.path);
        value["full-backing-filename"] = json!(layer.base_path);
        value["backing-filename-format"] = base.format.name().into();
        value["backing-chain-length"] = layer.depth.into();
        if let Some(snapshot) = &base.options.snapshot {
            value["backing-snapshot"] = json!(snapshot);
        }
    }
    if let Some(base) = &layer.store_base {
        let hex = |id: &[u8; 16]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        value["store-base"] =
            json!({ "store": hex(&base.store), "snapshot": hex(&base.snapshot), "size": base.size });
    }
    value
}

fn written(blocks: u64) -> u64 {
    blocks.saturating_mul(BLOCK_SIZE)
}

/// What [`json()`] said of a raw disk, a layer or a sealed snapshot.
fn of_json(value: &Value) -> Option<DiskInfo> {
    let path_in = |name: &str| value[name].as_str().map(PathBuf::from);
    let format = match value["format"].as_str()? {
        // Nobody can name it as the format of a file.
        name if name == Format::Sealed.name() => Format::Sealed,
        name => name.parse().ok()?,
    };
    let data = &value["format-specific"]["data"];
    let base = path_in("backing-filename").map(|path| {
        let format = value["backing-filename-format"].as_str().and_then(|name| name.parse().ok());
        BaseSpec::new(path, format.unwrap_or(Format::Raw))
    });
    let virtual_size = value["virtual-size"].as_u64()?;
    let blocks = |name: &str| data[name].as_u64().map(|bytes| bytes / BLOCK_SIZE);
    let written = |name: &str| data["written-bytes"][name].as_u64().map(|bytes| bytes / BLOCK_SIZE);
    let layer = || {
        Some(LayerInfo {
            size: virtual_size,
            id: data["id"].as_str()?.to_owned(),
            segment_size: data["segment-size"].as_u64()?,
            base,
            store_base: None,
            is_empty: false,
            base_path: path_in("full-backing-filename"),
            live_blocks: blocks("live-bytes")?,
            used_bytes: 0,
            dead_blocks: blocks("dead-bytes")?,
            generation: data["generation"].as_u64()?,
            sequence: data["sequence"].as_u64()?,
            clean: value["dirty-flag"] == false,
            allowed_bytes: data["allowed-bytes"].as_u64()?,
            beside_bytes: data["beside-bytes"].as_u64()?,
            occupied_bytes: 0,
            traffic: Traffic {
                guest: written("guest")?,
                moved: written("moved")?,
                nodes: written("map")?,
                index: written("log")?,
            },
            lanes: 0,
            map_stored_bytes: data["map-bytes"].as_u64()?,
            map_cache_bytes: 0,
            map_bytes: 0,
            map_reads: 0,
            depth: 0,
            index_bytes: 0,
        })
    };
    Some(DiskInfo {
        path: path_in("filename")?,
        format,
        virtual_size,
        actual_size: value["actual-size"].as_u64()?,
        is_device: value["block-device"].as_bool()?,
        is_direct: value["direct-io"].as_bool()?,
        gives_space_back: value["gives-space-back"].as_bool(),
        layer: if format == Format::Layer { Some(layer()?) } else { None },
        qcow2: None,
        root: value["root"].as_str().and_then(hash_of),
    })
}

/// A hash from its 64 digits.
fn hash_of(digits: &str) -> Option<Hash> {
    let mut hash = Hash::ZERO;
    let is_hash = digits.len() == 2 * Hash::BYTES && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    for (i, byte) in hash.0.iter_mut().enumerate().take_while(|_| is_hash) {
        *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).ok()?;
    }
    is_hash.then_some(hash)
}

fn add_qcow2(value: &mut Value, qcow2: &Qcow2Info) {
    value["cluster-size"] = qcow2.cluster_size.into();
    value["format-specific"] = json!({
        "type": "qcow2",
        "data": {
            "compat": compat(qcow2),
            "compression-type": qcow2.compression.to_string(),
            "lazy-refcounts": qcow2.lazy_refcounts,
            "refcount-bits": qcow2.refcount_bits,
            "corrupt": qcow2.corrupt,
            "extended-l2": qcow2.extended_l2,
        },
    });
    if let Some(data_file) = &qcow2.data_file {
        let data = &mut value["format-specific"]["data"];
        data["data-file"] = json!(data_file);
        data["data-file-raw"] = qcow2.data_file_raw.into();
    }
    if let Some(backing) = &qcow2.backing {
        value["backing-filename"] = json!(backing.name);
        value["full-backing-filename"] = json!(backing.path.to_string_lossy());
        if let Some(format) = &backing.format {
            value["backing-filename-format"] = json!(format);
        }
    }
    if !qcow2.snapshots.is_empty() {
        value["snapshots"] = qcow2.snapshots.iter().map(snapshot).collect();
    }
}

fn snapshot(snapshot: &Snapshot) -> Value {
    json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_bytes,
        "date-sec": snapshot.date.0,
        "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock_ns / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_ns % 1_000_000_000,
    })
}
