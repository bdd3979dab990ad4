"""What a training did to a model beside its decisions."""
