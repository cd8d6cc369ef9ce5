//! Sources over real images.

use std::path::Path;

use super::*;
use crate::create::{CreateDisk, create};
use crate::format::Format;
use crate::layer::{BaseSpec, CreateLayer, Layer, OpenLayer};
use crate::open::OpenDisk;
use crate::sealed::trial::{Draw, Model, Trial, block_bytes};
use crate::side::Side;
use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::Command;
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::BLOCK_SIZE;

fn side(path: &Path, format: Format, read_only: bool) -> Side<BlockingEngine> {
    let options = OpenDisk { format: Some(format), read_only, ..OpenDisk::default() };
    Side::open(&HostStorage, Io::new(BlockingEngine::new().unwrap()), path, options).unwrap()
}

fn make(path: &Path, disk: CreateDisk) {
    let io = Io::new(BlockingEngine::new().unwrap());
    let path = path.to_owned();
    block_on(&io.clone(), async move { create(&HostStorage, &io, &path, disk).await }).unwrap();
}

/// Makes a disk hold what differs between two models, and in part what does not.
fn write(side: &mut Side<BlockingEngine>, from: &Model, to: &Model) {
    for at in 0..to.blocks.len() as u64 {
        let number = to.blocks[at as usize];
        if from.blocks[at as usize] == number && at % 50 != 7 {
            continue;
        }
        let range = at * BLOCK_SIZE..((at + 1) * BLOCK_SIZE).min(to.size);
        let len = (range.end - range.start) as usize;
        let command = if number == 0 {
            Command::WriteZeroes
        } else {
            let buffer = SharedBuf::heap(len);
            buffer.write_at(0, &block_bytes(number)[..len]);
            Command::Write(buffer.into())
        };
        side.submit(range, command);
        side.finish().unwrap();
    }
}

#[test]
fn an_image_and_the_layer_over_it_are_sealed_as_they_read() {
    for seed in 0..6 {
        let (mut draw, mut trial) = (Draw(seed), Trial::new());
        let folder = tempfile::tempdir().unwrap();
        let (raw, layer) = (folder.path().join("base.raw"), folder.path().join("top.layer"));
        let mut old = Model { size: 3000 * BLOCK_SIZE - 1536, blocks: vec![0; 3000] };
        (0..1200).for_each(|at| old.blocks[700 + at] = 1 + draw.below(900));
        let nothing = Model { blocks: vec![0; 3000], ..old.clone() };
        let mut new = old.clone();
        for _ in 0..12 {
            let (start, number) = (draw.below(3000) as usize, draw.below(3) * draw.below(5000));
            let end = (start + 1 + draw.below(80) as usize).min(3000);
            new.blocks[start..end]
                .iter_mut()
                .zip(0..)
                .for_each(|(block, i)| *block = number + i * number.min(1));
        }

        make(&raw, CreateDisk::empty(Format::Raw, old.size).unwrap());
        let mut disk = side(&raw, Format::Raw, false);
        write(&mut disk, &nothing, &old);
        disk.close().unwrap();
        let base = trial.seal(DiskSource::new(side(&raw, Format::Raw, true)), None);
        assert_eq!(base.root.hash(), old.root_hash(), "seed {seed}");
        assert!(base.stats.blocks_read < 2000, "holes are not read: {:?}", base.stats);
        trial.check(&base.root, &old);

        let spec = BaseSpec::new(&raw, Format::Raw);
        make(&layer, CreateDisk::Layer(CreateLayer { base: Some(spec), ..CreateLayer::default() }));
        let mut disk = side(&layer, Format::Layer, false);
        write(&mut disk, &old, &new);
        disk.close().unwrap();
        let whole = Trial::new().seal(DiskSource::new(side(&layer, Format::Layer, true)), None);
        assert_eq!(whole.root.hash(), new.root_hash());

        let (io, path) = (trial.io.clone(), layer.clone());
        let options = OpenLayer { read_only: true, ..OpenLayer::default() };
        let opened =
            block_on(&trial.io, async move { Layer::open(&HostStorage, &io, &path, &options).await });
        let source = FrozenSource::new(opened.unwrap(), &trial.io);
        let sealed = trial.seal(source, Some(base.root));
        assert_eq!(sealed.root.hash(), new.root_hash());
        assert!(sealed.stats.blocks_read < 12 * 80 + 3000 / 50, "what the layer holds: {:?}", sealed.stats);
        assert!(sealed.stats.duplicate >= 10, "what was written again: {:?}", sealed.stats);
        trial.check(&sealed.root, &new);
    }
}
