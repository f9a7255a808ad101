"""The data of a training run."""

from train.data.packing import AnnotationFile as AnnotationFile
