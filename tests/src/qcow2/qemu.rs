//! Images made and read by QEMU's own tools.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::sim::rng::Rng;

/// An image that was made.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes in a cluster.
    pub cluster: u64,
    /// Whether it may have compressed clusters.
    pub packs: bool,
}

/// A folder where `qemu-img` and `qemu-io` work.
pub struct Qemu {
    folder: TempDir,
}

impl Default for Qemu {
    fn default() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }
}

impl Qemu {
    /// A file here.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.folder.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{program} (qemu-utils): {e}"));
        // It may end before it has read everything.
        let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
        child.wait_with_output().expect("it ends")
    }

    /// Runs `qemu-img` with arguments separated by spaces; what it said on success, else its complaint.
    ///
    /// # Errors
    /// It failed.
    pub fn try_img(&self, line: &str) -> Result<String, String> {
        let output = self.run("qemu-img", &line.split_whitespace().collect::<Vec<_>>(), "");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// The same, which must succeed.
    ///
    /// # Panics
    /// When it fails.
    pub fn img(&self, line: &str) -> String {
        self.try_img(line).unwrap_or_else(|error| panic!("qemu-img {line}: {error}"))
    }

    /// Runs commands of `qemu-io` on an image.
    ///
    /// # Panics
    /// When one of them fails.
    pub fn io(&self, format: &str, image: &str, commands: &[String]) {
        let output = self.run("qemu-io", &["-f", format, image], &(commands.join("\n") + "\nquit\n"));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        let failed = said.contains("failed") || said.contains("rror") || !output.status.success();
        assert!(!failed && complaint.is_empty(), "{image}: {said}{complaint}");
    }

    /// What QEMU reads from a disk; `options` are of `qemu-img convert`.
    pub fn contents(&self, options: &str, image: &str) -> Vec<u8> {
        self.img(&format!("convert {options} -O raw {image} contents.out"));
        let bytes = fs::read(self.path("contents.out")).expect("what was converted");
        fs::remove_file(self.path("contents.out")).expect("it is there");
        bytes
    }

    /// Random commands for a disk: writes of random bytes and of one byte, aligned and
    /// not, compressed, zeroes with and without giving space back, discards.
    pub fn history(&self, rng: &mut Rng, made: &Made, count: usize) -> Vec<String> {
        let mut noise = vec![0; 1 << 20];
        rng.fill(&mut noise);
        fs::write(self.path("noise"), noise).expect("space");
        let Made { size, cluster, packs } = *made;
        let sectors = size / 512;
        let mut commands = Vec::new();
        // First, because QEMU compresses into clusters that hold nothing yet.
        let mut packed: Vec<u64> = (0..6).map(|_| rng.below((size / cluster).max(1)) * cluster).collect();
        packed.sort_unstable();
        packed.dedup();
        for start in packed.into_iter().filter(|start| packs && start + cluster <= size) {
            commands.push(format!("write -q -c -P {} {start} {cluster}", rng.between(1, 255)));
        }
        for _ in 0..count {
            let start = rng.below(sectors) * 512;
            let len = (rng.between(1, 400) * 512).min(size - start);
            let byte = rng.between(1, 255);
            let whole = start / cluster * cluster;
            let whole_len = (rng.between(1, 3) * cluster).min(size - whole);
            commands.push(match rng.below(9) {
                0..=2 => format!("write -q -s noise {start} {len}"),
                3 => format!("write -q -P {byte} {start} {len}"),
                4 => format!("write -q -P {byte} {whole} {whole_len}"),
                5 => format!("write -q -z {start} {len}"),
                6 => format!("write -q -z -u {whole} {whole_len}"),
                7 => format!("discard -q {whole} {whole_len}"),
                _ => format!("write -q -s noise {whole} {whole_len}"),
            });
        }
        commands
    }
}
