//! Tests that the recipes in configs/ load, and that each says what it is meant to say.

use super::*;

fn recipe(name: &str) -> Config {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    Config::load(&folder.join(format!("{name}.yaml")), &[]).unwrap()
}

#[test]
fn every_recipe_is_understood() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let config = Config::load(&path, &[]).unwrap();
        assert_eq!(Some(config.name.as_str()), path.file_stem().and_then(|stem| stem.to_str()));
        names.push(config.name);
    }
    names.sort();
    assert_eq!(names, ["e5-base", "minilm", "mpnet-nli", "quickstart", "zeta"]);
}

#[test]
fn zeta_has_its_thirty_sets() {
    let config = recipe("zeta");
    let sets = &config.data.train;
    let samples: u64 = sets.iter().map(|set| set.samples.unwrap()).sum();
    assert_eq!((sets.len(), samples), (30, 956_511));
    let of_kind = |kind| sets.iter().filter(|set| set.kind == Some(kind)).count();
    assert_eq!((of_kind(RowKind::Labelled), of_kind(RowKind::Triplets)), (14, 1));
    for set in sets {
        assert!(
            set.query_prompt.starts_with("Instruct: ") && set.query_prompt.ends_with("\nQuery: "),
            "{}",
            set.name
        );
        // Only texts of one kind have the instruction on both sides.
        let alike = set.kind == Some(RowKind::Labelled) || set.name.starts_with("sts");
        let expected = if alike { set.query_prompt.as_str() } else { "" };
        assert_eq!(set.document_prompt, expected, "{}", set.name);
    }
    let lora = config.lora.unwrap();
    assert_eq!((lora.rank, lora.alpha, lora.dropout), (Some(8), Some(32.0), Some(0.1)));
    assert_eq!(lora.targets, Some(Targets::AllLinear));
    assert_eq!(
        (config.data.negatives, config.loss.temperature, config.loss.in_batch_negatives),
        (5, 0.2, false)
    );
    assert_eq!((config.training.batch_size, config.training.chunk_size), (1024, Some(8)));
    assert_eq!((config.evaluation.sets.len(), config.evaluation.patience), (13, Some(10)));
}
