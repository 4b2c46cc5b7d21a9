// What metal-cpp uses of Apple's header.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
