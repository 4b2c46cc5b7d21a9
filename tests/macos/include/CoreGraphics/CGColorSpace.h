// What metal-cpp uses of Apple's header.
#pragma once

typedef struct CGColorSpace* CGColorSpaceRef;
