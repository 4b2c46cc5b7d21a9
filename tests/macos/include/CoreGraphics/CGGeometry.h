// What metal-cpp uses of Apple's header.
#pragma once

typedef struct CGSize {
  double width;
  double height;
} CGSize;
