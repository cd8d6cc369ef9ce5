//! `cargo xtask demo`: two Debian guests at once, each from its own layer over one base image.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sapwood_tests::guest::{Assets, Backend, BackendSpec, Disk, Guest, GuestReport, GuestSpec, Vmm};

use crate::process;
use crate::setup::{self, Outcome};
use crate::workspace::Workspace;

const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// The two guests; each writes a file of its own name.
const NAMES: [&str; 2] = ["oak", "birch"];
const WRITTEN_MIB: u32 = 8;

/// Runs the demo; says whether everything was as it should.
///
/// # Errors
/// A program failed or a guest said something else than it must; the message says what.
pub fn run(workspace: &Workspace) -> Result<bool> {
    let assets = match setup::ensure(&workspace.guest())? {
        Outcome::Ready(assets) => assets,
        Outcome::Unable(reason) => {
            println!("skipped: demo: {reason}");
            return Ok(false);
        }
    };
    let demo = Demo::prepare(workspace, assets)?;
    println!("Sapwood: two guests, one base\n");
    let before = demo.print_base()?;
    for layer in &demo.layers {
        demo.create(layer)?;
    }
    println!("\nboth guests boot at once, each from its layer ({})", demo.vmm.name());
    demo.round(1, &write_script)?;
    println!("\nthey boot again and look");
    demo.round(2, &look_script)?;
    demo.print_layers()?;
    let after = checksum(&demo.assets.root_image)?;
    ensure!(before == after, "the base has changed: {before} before, {after} after");
    println!("\nthe base is untouched: sha256 {} as before", short(&after));
    println!("neither guest saw the other's change; each saw its own after a restart");
    println!("the layers stay in {}", demo.directory.display());
    Ok(true)
}

struct Demo {
    program: PathBuf,
    assets: Assets,
    vmm: Vmm,
    directory: PathBuf,
    layers: Vec<PathBuf>,
}

impl Demo {
    fn prepare(workspace: &Workspace, assets: Assets) -> Result<Self> {
        let program = workspace.sapwood()?;
        let directory = workspace.target.join("demo");
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir_all(&directory)?;
        let layers = NAMES.map(|name| directory.join(format!("{name}.layer"))).into();
        let vmm = Vmm::preferred(&assets, &program)?;
        Ok(Self { program, assets, vmm, directory, layers })
    }

    fn sapwood(&self, arguments: &[&str], disk: &Path) -> Result<String> {
        let mut command = Command::new(&self.program);
        process::output(command.args(arguments).arg(disk), COMMAND_LIMIT)
    }

    fn print_base(&self) -> Result<String> {
        let image = &self.assets.root_image;
        let sum = checksum(image)?;
        let metadata = fs::metadata(image)?;
        println!(
            "base   {:<12} {:>9} virtual  {:>9} allocated  sha256 {}",
            "root.raw",
            size(metadata.len()),
            size(metadata.blocks() * 512),
            short(&sum)
        );
        Ok(sum)
    }

    fn create(&self, layer: &Path) -> Result<()> {
        let base = self.assets.root_image.display().to_string();
        let begin = Instant::now();
        self.sapwood(&["create", "-f", "layer", "-b", &base, "-F", "raw"], layer)?;
        let elapsed = begin.elapsed();
        println!(
            "layer  {:<12} {:>9} virtual  {:>9} allocated  created in {:.1} ms",
            file_name(layer),
            size(self.virtual_size(layer)?),
            size(fs::metadata(layer)?.blocks() * 512),
            elapsed.as_secs_f64() * 1e3
        );
        Ok(())
    }

    fn virtual_size(&self, layer: &Path) -> Result<u64> {
        let text = self.sapwood(&["info", "--output=json"], layer)?;
        let info: serde_json::Value = serde_json::from_str(&text)?;
        info["virtual-size"].as_u64().with_context(|| format!("no virtual-size in {text}"))
    }

    /// Boots a guest from each layer at the same time and prints what each says.
    fn round(&self, round: u32, script: &dyn Fn(&str, &str) -> String) -> Result<()> {
        let sockets = tempfile::tempdir()?;
        let mut running = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let socket = sockets.path().join(NAMES[index]);
            let backend = Backend::start(&self.serve(layer), &socket)?;
            let script = script(NAMES[index], NAMES[1 - index]);
            let spec = GuestSpec { cpus: 1, ..GuestSpec::new(vec![Disk::new(&socket)], script) };
            let guest = Guest::boot_with(&spec, &self.assets, &self.vmm)?;
            running.push((NAMES[index], backend, guest));
        }
        for (name, backend, guest) in running {
            let report = guest.succeed().with_context(|| format!("guest {name}, boot {round}"))?;
            print_guest(name, &report);
            backend.stop()?;
        }
        Ok(())
    }

    fn serve(&self, layer: &Path) -> BackendSpec {
        BackendSpec::layer(layer, 1).with_program(&self.program)
    }

    fn print_layers(&self) -> Result<()> {
        println!();
        for layer in &self.layers {
            println!(
                "layer  {:<12} {:>9} virtual  {:>9} allocated",
                file_name(layer),
                size(self.virtual_size(layer)?),
                size(fs::metadata(layer)?.blocks() * 512)
            );
        }
        Ok(())
    }
}

fn write_script(own: &str, _other: &str) -> String {
    format!(
        "echo 'I am {own}' >/etc/{own}\n\
         dd if=/dev/urandom of=/srv/{own} bs=1M count={WRITTEN_MIB} status=none\n\
         sync\n\
         sha256sum </srv/{own} | cut -c1-64 >/etc/{own}.sum\n\
         value said \"booted $(. /etc/os-release; echo \"$PRETTY_NAME\") on $(uname -r)\"\n\
         value said 'wrote /etc/{own} and {WRITTEN_MIB} MiB into /srv/{own}'\n"
    )
}

fn look_script(own: &str, other: &str) -> String {
    format!(
        "test \"$(cat /etc/{own})\" = 'I am {own}'\n\
         test \"$(sha256sum </srv/{own} | cut -c1-64)\" = \"$(cat /etc/{own}.sum)\"\n\
         test ! -e /etc/{other}\n\
         test ! -e /srv/{other}\n\
         value said \"/srv holds: $(ls /srv); /srv/{own} has its checksum; no trace of {other}\"\n"
    )
}

fn print_guest(name: &str, report: &GuestReport) {
    let booted = report.booted.unwrap_or_default().as_secs_f64();
    let whole = report.elapsed.as_secs_f64();
    println!("  {name:<6} up in {booted:.1} s, off after {whole:.1} s");
    for line in report.values("said") {
        println!("         {line}");
    }
}

fn checksum(file: &Path) -> Result<String> {
    let text = process::output(Command::new("sha256sum").arg(file), COMMAND_LIMIT)?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

fn short(sum: &str) -> &str {
    sum.get(..16).unwrap_or(sum)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `bytes` with a binary unit and three or four digits.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 100.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(4096), "4.0 KiB");
        assert_eq!(size(1 << 30), "1.0 GiB");
        assert_eq!(size(300 << 20), "300 MiB");
    }
}
